// Weights times the activations of a few tokens: what a decoder does for every token it writes. Bound by reading the weights.
//
// y[token][row] = sum over columns of weight[row][column] * x[token][column], plus bias[row]; all float32.
// A block has ROWS rows. Its lanes share out the chunks of these rows, so that a warp reads consecutive words, and the
// inputs of a chunk, once in registers, serve all rows.
//   grid: (rows / ROWS, rounded up), block: (32, warps up to MAX_WARPS)
//   group_shift: chunks of a group are 2^group_shift; 31 for one group per row
//   tokens: at most TOKENS; beyond them the last is computed again and not written

template <typename Weights, int TOKENS>
__device__ __forceinline__ void gemv(
    const word* __restrict__ codes, const half_bits* __restrict__ scales, const float* __restrict__ offsets,
    const float* __restrict__ x, const float* __restrict__ bias, float* __restrict__ y,
    int out_features, int in_features, int group_shift, int tokens)
{
    const int chunks = in_features / CHUNK, groups = ((chunks - 1) >> group_shift) + 1;
    const int first_row = blockIdx.x * ROWS;
    float sums[ROWS][TOKENS] = {};
#pragma unroll 2
    for (int chunk = threadIdx.y * WARP + threadIdx.x; chunk < chunks; chunk += blockDim.y * WARP) {
        float inputs[TOKENS][CHUNK], input_sums[TOKENS];
        for (int t = 0; t < TOKENS; ++t) {
            load_floats(x + (size_t)smaller(t, tokens - 1) * in_features + chunk * CHUNK, inputs[t]);
            input_sums[t] = 0.0f;
            for (int c = 0; c < CHUNK; ++c) {
                if (offsets) input_sums[t] += inputs[t][c];
                inputs[t][c] *= Weights::input_factor(c);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const int row = smaller(first_row + r, out_features - 1);
            word words[Weights::WORDS];
            load_words<Weights::WORDS>(codes + ((size_t)row * chunks + chunk) * Weights::WORDS, words);
            float dots[TOKENS] = {};
            for (int c = 0; c < CHUNK; ++c) {
                const float code = Weights::code(words, c);
                for (int t = 0; t < TOKENS; ++t) dots[t] += code * inputs[t][c];
            }
            const size_t group = (size_t)row * groups + (chunk >> group_shift);
            const float scale = Weights::GROUPED ? widen(scales[group]) : 1.0f;
            for (int t = 0; t < TOKENS; ++t) {
                sums[r][t] += scale * dots[t];
                if (offsets) sums[r][t] += offsets[group] * input_sums[t];
            }
        }
    }
    write_sums<TOKENS>(sums, bias, y, out_features, tokens);
}

#define GEMV(NAME, WEIGHTS, TOKENS)                                                                       \
    extern "C" __global__ void NAME(                                                                      \
        const word* codes, const half_bits* scales, const float* offsets, const float* x,                 \
        const float* bias, float* y, int out_features, int in_features, int group_shift, int tokens)      \
    {                                                                                                     \
        gemv<WEIGHTS, TOKENS>(                                                                            \
            codes, scales, offsets, x, bias, y, out_features, in_features, group_shift, tokens);          \
    }

GEMV(gemv_4bit_1, FourBits, 1)
GEMV(gemv_4bit_2, FourBits, 2)
GEMV(gemv_4bit_4, FourBits, 4)
GEMV(gemv_4bit_8, FourBits, 8)
GEMV(gemv_8bit_1, EightBits, 1)
GEMV(gemv_8bit_2, EightBits, 2)
GEMV(gemv_8bit_4, EightBits, 4)
GEMV(gemv_8bit_8, EightBits, 8)
GEMV(gemv_bfloat16_1, Bfloat16, 1)
GEMV(gemv_bfloat16_2, Bfloat16, 2)
GEMV(gemv_bfloat16_4, Bfloat16, 4)
GEMV(gemv_bfloat16_8, Bfloat16, 8)
GEMV(gemv_float16_1, Float16, 1)
GEMV(gemv_float16_2, Float16, 2)
GEMV(gemv_float16_4, Float16, 4)
GEMV(gemv_float16_8, Float16, 8)
