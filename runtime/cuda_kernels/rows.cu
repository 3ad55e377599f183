// What a block of the products has: ROWS rows of the weight, whose columns its lanes share out. Here their sums meet.

static const int ROWS = 4;

template <int TOKENS>
__device__ __forceinline__ void write_sums(
    float sums[ROWS][TOKENS], const float* bias, float* y, int out_features, int tokens)
{
    __shared__ float partial[MAX_WARPS][ROWS * TOKENS];
    const int lane = threadIdx.x, warp = threadIdx.y;
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = team_sum(sums[r][t]);
            if (lane == 0) partial[warp][r * TOKENS + t] = sum;
        }
    __syncthreads();
    const int r = lane / TOKENS, t = lane % TOKENS, row = blockIdx.x * ROWS + r;
    if (warp == 0 && r < ROWS && t < tokens && row < out_features) {
        float sum = bias ? bias[row] : 0.0f;
        for (int w = 0; w < blockDim.y; ++w) sum += partial[w][lane];
        y[(size_t)t * out_features + row] = sum;
    }
}
