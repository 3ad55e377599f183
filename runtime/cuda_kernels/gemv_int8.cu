// The same product with activations rounded to 8 bits, 32 at a time, and four multiplications an instruction (dp4a).
// Faster where arithmetic limits, and not exact: no command runs it, only whoever wraps a linear in
// runtime/cuda_linear.py's with_int8_activations. Needs compute capability 6.1.

static const int INPUT_BLOCK = 32;  // columns that share one activation scale

// x float32 [tokens][in_features] -> codes int8 of the same shape, scales float32 [tokens][in_features / 32].
//   grid: (blocks of 32 columns / warps, rounded up; tokens), block: (32, warps)
extern "C" __global__ void round_activations(const float* x, signed char* codes, float* scales, int in_features)
{
    const int blocks = in_features / INPUT_BLOCK, block = blockIdx.x * blockDim.y + threadIdx.y;
    if (block >= blocks) return;  // a whole warp at a time
    const size_t index = (size_t)blockIdx.y * in_features + block * INPUT_BLOCK + threadIdx.x;
    // What is no number makes the scale none: fmaxf would hide it.
    const float value = x[index], scale = warp_largest(fabsf(value)) / 127.0f + team_sum(value - value);
    codes[index] = (signed char)(scale > 0.0f ? (int)rintf(value / scale) : 0);
    if (threadIdx.x == 0) scales[(size_t)blockIdx.y * blocks + block] = scale;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 610

struct FourBitDot {
    static const int WORDS = 1;
    static const int MIDDLE = 8;  // what codes are stored with, taken off again through the sum of the inputs

    static __device__ __forceinline__ int dot(const word* words, int2 inputs)
    {
        return __dp4a((int)(words[0] >> 4 & 0x0f0f0f0fu), inputs.y, __dp4a((int)(words[0] & 0x0f0f0f0fu), inputs.x, 0));
    }
};

struct EightBitDot {
    static const int WORDS = 2;
    static const int MIDDLE = 0;  // flipping its top bit makes code + 128 a signed byte

    static __device__ __forceinline__ int dot(const word* words, int2 inputs)
    {
        return __dp4a((int)(words[1] ^ 0x80808080u), inputs.y, __dp4a((int)(words[0] ^ 0x80808080u), inputs.x, 0));
    }
};

template <typename Weights, int TOKENS>
__device__ __forceinline__ void gemv_int8(
    const word* __restrict__ codes, const half_bits* __restrict__ scales, const float* __restrict__ offsets,
    const int2* __restrict__ x, const float* __restrict__ x_scales, const float* __restrict__ bias,
    float* __restrict__ y, int out_features, int in_features, int group_shift, int tokens)
{
    const int chunks = in_features / CHUNK, groups = ((chunks - 1) >> group_shift) + 1;
    const int chunks_per_scale = INPUT_BLOCK / CHUNK, first_row = blockIdx.x * ROWS;
    float sums[ROWS][TOKENS] = {};
#pragma unroll 2
    for (int chunk = threadIdx.y * WARP + threadIdx.x; chunk < chunks; chunk += blockDim.y * WARP) {
        int2 inputs[TOKENS];
        int input_sums[TOKENS];
        float input_scales[TOKENS];
        for (int t = 0; t < TOKENS; ++t) {
            const size_t index = (size_t)smaller(t, tokens - 1) * chunks + chunk;
            inputs[t] = x[index];
            input_scales[t] = x_scales[index / chunks_per_scale];
            input_sums[t] = __dp4a(inputs[t].x, 0x01010101, __dp4a(inputs[t].y, 0x01010101, 0));
        }
        for (int r = 0; r < ROWS; ++r) {
            const int row = smaller(first_row + r, out_features - 1);
            word words[Weights::WORDS];
            load_words<Weights::WORDS>(codes + ((size_t)row * chunks + chunk) * Weights::WORDS, words);
            const size_t group = (size_t)row * groups + (chunk >> group_shift);
            const float scale = widen(scales[group]), offset = offsets ? offsets[group] : 0.0f;
            for (int t = 0; t < TOKENS; ++t) {
                const int dot = Weights::dot(words, inputs[t]) - Weights::MIDDLE * input_sums[t];
                sums[r][t] += input_scales[t] * (scale * (float)dot + offset * (float)input_sums[t]);
            }
        }
    }
    write_sums<TOKENS>(sums, bias, y, out_features, tokens);
}

#define GEMV_INT8(NAME, WEIGHTS, TOKENS)                                                                  \
    extern "C" __global__ void NAME(                                                                      \
        const word* codes, const half_bits* scales, const float* offsets, const int2* x,                  \
        const float* x_scales, const float* bias, float* y,                                               \
        int out_features, int in_features, int group_shift, int tokens)                                   \
    {                                                                                                     \
        gemv_int8<WEIGHTS, TOKENS>(                                                                       \
            codes, scales, offsets, x, x_scales, bias, y, out_features, in_features, group_shift, tokens); \
    }

GEMV_INT8(gemv_int8_4bit_1, FourBitDot, 1)
GEMV_INT8(gemv_int8_4bit_2, FourBitDot, 2)
GEMV_INT8(gemv_int8_4bit_4, FourBitDot, 4)
GEMV_INT8(gemv_int8_4bit_8, FourBitDot, 8)
GEMV_INT8(gemv_int8_8bit_1, EightBitDot, 1)
GEMV_INT8(gemv_int8_8bit_2, EightBitDot, 2)
GEMV_INT8(gemv_int8_8bit_4, EightBitDot, 4)
GEMV_INT8(gemv_int8_8bit_8, EightBitDot, 8)

#endif
