// Rows of a packed weight as float16 or float32, for a GEMM to multiply with: out[row][column], each value rounded once.
//
//   grid: (rows), block: any number of threads; codes, scales and offsets point at the first row wanted

__device__ __forceinline__ void store_chunk(const float* values, float* out)
{
    ((float4*)out)[0] = make_float4(values[0], values[1], values[2], values[3]);
    ((float4*)out)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

__device__ __forceinline__ void store_chunk(const float* values, half_bits* out)
{
    word pairs[4];
    for (int p = 0; p < 4; ++p) pairs[p] = narrow(values[2 * p]) | (word)narrow(values[2 * p + 1]) << 16;
    *(uint4*)out = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <typename Weights, typename Output>
__device__ __forceinline__ void dequantize(
    const word* __restrict__ codes, const half_bits* __restrict__ scales, const float* __restrict__ offsets,
    Output* __restrict__ out, int in_features, int group_shift)
{
    const int chunks = in_features / CHUNK, groups = ((chunks - 1) >> group_shift) + 1;
    const size_t row = blockIdx.x;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        word words[Weights::WORDS];
        load_words<Weights::WORDS>(codes + (row * chunks + chunk) * Weights::WORDS, words);
        const size_t group = row * groups + (chunk >> group_shift);
        const float scale = widen(scales[group]), offset = offsets ? offsets[group] : 0.0f;
        float values[CHUNK];
        for (int c = 0; c < CHUNK; ++c)
            values[c] = scale * (Weights::code(words, c) * Weights::input_factor(c)) + offset;
        store_chunk(values, out + (row * chunks + chunk) * CHUNK);
    }
}

#define DEQUANTIZE(NAME, WEIGHTS, OUTPUT)                                                                 \
    extern "C" __global__ void NAME(                                                                      \
        const word* codes, const half_bits* scales, const float* offsets, OUTPUT* out,                    \
        int in_features, int group_shift)                                                                 \
    {                                                                                                     \
        dequantize<WEIGHTS, OUTPUT>(codes, scales, offsets, out, in_features, group_shift);               \
    }

DEQUANTIZE(dequantize_4bit_float32, FourBits, float)
DEQUANTIZE(dequantize_4bit_float16, FourBits, half_bits)
DEQUANTIZE(dequantize_8bit_float32, EightBits, float)
DEQUANTIZE(dequantize_8bit_float16, EightBits, half_bits)
