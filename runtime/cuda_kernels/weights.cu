// How weights lie in memory, and how a chunk of 8 columns of one row becomes floats. runtime/cuda_layout.py writes this layout.
//
// A row is contiguous, its columns in the order of their groups:
//   4 bits: a chunk is one word; byte b holds column b in its low half and column b + 4 in its high half, as code + 8
//   8 bits: a chunk is two words of four columns, as code + 128
//   16 bits: a chunk is four words of two columns, the lower column low
// A packed weight is scale[row][group] * code, plus offset[row][group] where zeros are not in the middle.

static const int CHUNK = 8;

// An integer below 2^23 put into the mantissa of 2^23 is a float without any conversion, which would run at quarter rate.
static const word MAGIC = 0x4b000000u;

struct FourBits {
    static const int WORDS = 1;
    static const bool GROUPED = true;

    // Half bytes are not shifted down: one that lies `shift` bits up counts 2^shift times, and its inputs as much less.
    static __device__ __forceinline__ int half_byte(int column) { return 2 * (column & 3) + (column >> 2); }
    static __device__ __forceinline__ int shift(int column) { return 4 * (half_byte(column) & 3); }
    static __device__ __forceinline__ float input_factor(int column) { return 1.0f / (1 << shift(column)); }

    static __device__ __forceinline__ float code(const word* words, int column)
    {
        const word half_word = half_byte(column) & 4 ? words[0] >> 16 : words[0];
        return __uint_as_float((half_word & (15u << shift(column))) | MAGIC) - (8388608.0f + (8 << shift(column)));
    }
};

struct EightBits {
    static const int WORDS = 2;
    static const bool GROUPED = true;

    static __device__ __forceinline__ float input_factor(int) { return 1.0f; }

    static __device__ __forceinline__ float code(const word* words, int column)
    {
        return __uint_as_float(__byte_perm(words[column >> 2], MAGIC, 0x7650 | (column & 3))) - (8388608.0f + 128);
    }
};

struct Bfloat16 {
    static const int WORDS = 4;
    static const bool GROUPED = false;

    static __device__ __forceinline__ float input_factor(int) { return 1.0f; }

    static __device__ __forceinline__ float code(const word* words, int column)
    {
        const word pair = words[column >> 1];
        return __uint_as_float(column & 1 ? pair & 0xffff0000u : pair << 16);
    }
};

struct Float16 {
    static const int WORDS = 4;
    static const bool GROUPED = false;

    static __device__ __forceinline__ float input_factor(int) { return 1.0f; }

    static __device__ __forceinline__ float code(const word* words, int column)
    {
        return widen((half_bits)(words[column >> 1] >> 16 * (column & 1)));
    }
};

// The words of one chunk, by the widest load there is for so many.
template <int WORDS>
__device__ __forceinline__ void load_words(const word* __restrict__ source, word* words)
{
    if (WORDS == 1) {
        words[0] = source[0];
    } else if (WORDS == 2) {
        const uint2 pair = *(const uint2*)source;
        words[0] = pair.x, words[1] = pair.y;
    } else {
        const uint4 four = *(const uint4*)source;
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
}

__device__ __forceinline__ void load_floats(const float* __restrict__ source, float* floats)
{
    const float4 low = ((const float4*)source)[0], high = ((const float4*)source)[1];
    floats[0] = low.x, floats[1] = low.y, floats[2] = low.z, floats[3] = low.w;
    floats[4] = high.x, floats[5] = high.y, floats[6] = high.z, floats[7] = high.w;
}
