/* LANES numbers at a time, in GCC's and Clang's vector notation: 16 with AVX-512, 8 with AVX2. Only the integer dot
   product and the reading of halves need to know which. */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef int8_t few_bytes __attribute__((vector_size(LANES)));
/* The same wherever they lie in memory. */
typedef floats floats_at __attribute__((aligned(4), may_alias));
typedef bytes bytes_at __attribute__((aligned(1), may_alias));
typedef few_bytes few_bytes_at __attribute__((aligned(1), may_alias));
typedef int32_t four_bytes_at __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Arrays of registers stay in registers only where the loops over them are gone. */
#define UNROLLED _Pragma("GCC unroll 16")

enum { PARTS = PANEL / LANES, QUADS = BLOCK / 4 };

INLINE floats read_floats(const float *from) { return *(const floats_at *)from; }
INLINE void write_floats(float *to, floats value) { *(floats_at *)to = value; }
INLINE bytes read_bytes(const uint8_t *from) { return *(const bytes_at *)from; }
INLINE floats read_cached(const void *from, int64_t index, const int in_bytes)
{
    if (!in_bytes) return read_floats((const float *)from + index);
    return __builtin_convertvector(*(const few_bytes_at *)((const int8_t *)from + index), floats);
}
INLINE void write_bytes(int8_t *to, few_bytes value) { *(few_bytes_at *)to = value; }
INLINE int four_bytes(const int8_t *from) { return *(const four_bytes_at *)from; }
INLINE floats all_floats(float value) { return value - (floats){0}; }
INLINE ints all_ints(int value) { return value - (ints){0}; }
INLINE floats to_floats(ints value) { return __builtin_convertvector(value, floats); }
/* In two steps, for each of which there is an instruction; GCC makes the one step of scalars. */
INLINE few_bytes to_bytes(floats value) { return __builtin_convertvector(__builtin_convertvector(value, ints), few_bytes); }

INLINE floats larger(floats a, floats b)
{
    ints first = a > b;
    return (floats)((first & (ints)a) | (~first & (ints)b));
}

INLINE float sum_lanes(floats value)
{
    float found = 0;
    for (int lane = 0; lane < LANES / 2; lane++) found += value[lane] + value[lane + LANES / 2];
    return found;
}

/* Nearest integer, by the constant that leaves no bits for a fraction; for |value| below 2^22. */
INLINE floats nearest(floats value) { return (value + 12582912.0f) - 12582912.0f; }

/* e^value within two units in the last place: a power of two times a polynomial over half a octave to either side.
   Beyond -87 and 88 the power would leave its bits. What is no number stays none: `larger` gives its second then. */
INLINE floats exponential(floats value)
{
    value = -larger(all_floats(-88.0f), -larger(all_floats(-87.0f), value));
    floats octaves = nearest(value * 1.44269504088896341f);
    floats rest = value - octaves * 0.693359375f + octaves * 2.12194440e-4f;
    floats series = all_floats(1.9875691500e-4f);
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    ints power = (__builtin_convertvector(octaves, ints) + 127) << 23;
    return series * (floats)power;
}

#ifdef WITH_VNNI

INLINE float largest_lane(floats value) { return _mm512_reduce_max_ps((__m512)value); }
INLINE int sum_ints(ints value) { return _mm512_reduce_add_epi32((__m512i)value); }

/* To `sum`, products of 32 unsigned by 32 signed bytes for each lane; the signed ones are the same for all lanes.
   GCC 12 would read them into a register each by an instruction of its own: a sixth of the time of a prompt. */
INLINE ints dot_block(ints sum, const bytes *codes, const int8_t *inputs, const int wide)
{
    (void)wide;
    UNROLLED for (int quad = 0; quad < QUADS; quad++)
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes[quad]), "m"(*(const four_bytes_at *)(inputs + 4 * quad)));
    return sum;
}
#define WIDE_ZERO 128

INLINE floats read_halves(const uint16_t *from)
{
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

#else

INLINE float largest_lane(floats value)
{
    __m128 most = _mm_max_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
INLINE int sum_ints(ints value)
{
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

/* The same. Of codes below 16 the sums of 16 products are below what 16 bits hold: 16 * 15 * 127 = 30,480. Codes of 8 bits
   would saturate pairs of products: their magnitudes times inputs of their sign do not. */
INLINE ints dot_block(ints sum, const bytes *codes, const int8_t *inputs, const int wide)
{
    __m256i few = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
    UNROLLED for (int quad = 0; quad < QUADS; quad++) {
        __m256i own = (__m256i)codes[quad], four = _mm256_set1_epi32(four_bytes(inputs + 4 * quad));
        if (!wide) {
            few = _mm256_add_epi16(few, _mm256_maddubs_epi16(own, four));
            continue;
        }
        own = _mm256_xor_si256(own, _mm256_set1_epi8(-128));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(four, own));
        sum += (ints)_mm256_madd_epi16(pairs, ones);
    }
    return wide ? sum : sum + (ints)_mm256_madd_epi16(few, ones);
}
#define WIDE_ZERO 0

INLINE floats read_halves(const uint16_t *from)
{
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

#endif
