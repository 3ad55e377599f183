// One new token's attention over everything stored, for decoding. Query heads that share a key head share its reading.
//
// Compiled for one model: HEAD_DIM, GROUP (query heads per key head), CACHE (float or half_bits).
// The positions first[batch] .. *stored - 1 are visible: what lies before is padding. Both are read on the device, so that a
// captured graph serves a growing cache. A row without any visible position gives zeros.
//
// First kernel: every split of the positions gives unnormalized sums with their own maximum.
//   grid: (splits, key heads, batch), block: (32, MAX_WARPS)
// Second kernel: splits become one result.
//   grid: (heads, batch), block: (HEAD_DIM)

static const int SLICE = 8;                                                 // features of a key that one lane has
static const int TEAM = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;     // lanes that share a key; some idle at 96
static const int TEAMS = MAX_WARPS * WARP / TEAM;
static const float NOTHING = -1e30f;                                        // a maximum of no scores; finite, so never NaN

__device__ __forceinline__ void load_slice(const float* __restrict__ source, float* slice)
{
    const float4 low = ((const float4*)source)[0], high = ((const float4*)source)[1];
    slice[0] = low.x, slice[1] = low.y, slice[2] = low.z, slice[3] = low.w;
    slice[4] = high.x, slice[5] = high.y, slice[6] = high.z, slice[7] = high.w;
}

__device__ __forceinline__ void load_slice(const half_bits* __restrict__ source, float* slice)
{
    const uint4 four = *(const uint4*)source;
    const word pairs[4] = {four.x, four.y, four.z, four.w};
    for (int i = 0; i < SLICE; ++i) slice[i] = widen((half_bits)(pairs[i / 2] >> 16 * (i & 1)));
}

extern "C" __global__ void attend_splits(
    const float* __restrict__ queries, const CACHE* __restrict__ keys, const CACHE* __restrict__ values,
    const int* __restrict__ first, const int* __restrict__ stored,
    float* __restrict__ mixed, float* __restrict__ maxima, float* __restrict__ totals, int capacity, float scale)
{
    const int splits = gridDim.x, heads = gridDim.y * GROUP;
    const int thread = threadIdx.y * WARP + threadIdx.x, team = thread / TEAM;
    const int feature = thread % TEAM * SLICE;
    const bool idle = feature >= HEAD_DIM;
    const int visible = *stored - first[blockIdx.z], share = (visible + splits - 1) / splits;
    const int start = first[blockIdx.z] + blockIdx.x * share, end = smaller(start + share, *stored);
    const size_t first_head = (size_t)blockIdx.z * heads + blockIdx.y * GROUP;
    const size_t cache_row = (size_t)(blockIdx.z * gridDim.y + blockIdx.y) * capacity;

    float query[GROUP][SLICE], sums[GROUP][SLICE], largest[GROUP], total[GROUP];
    for (int g = 0; g < GROUP; ++g) {
        largest[g] = NOTHING, total[g] = 0.0f;
        for (int i = 0; i < SLICE; ++i) {
            query[g][i] = idle ? 0.0f : scale * queries[(first_head + g) * HEAD_DIM + feature + i];
            sums[g][i] = 0.0f;
        }
    }
    for (int base = start; base < end; base += TEAMS) {  // the same for all lanes of a warp, which exchange values inside
        const bool there = base + team < end;
        const size_t place = (cache_row + smaller(base + team, end - 1)) * HEAD_DIM + (idle ? 0 : feature);
        float key[SLICE], value[SLICE];
        load_slice(keys + place, key);
        load_slice(values + place, value);
        for (int g = 0; g < GROUP; ++g) {
            float score = 0.0f;
            for (int i = 0; i < SLICE; ++i) score += query[g][i] * key[i];
            score = team_sum(score, TEAM);
            if (!there) score = NOTHING;
            const float higher = fmaxf(largest[g], score);
            const float fade = expf(largest[g] - higher), weight = there ? expf(score - higher) : 0.0f;
            largest[g] = higher;
            total[g] = total[g] * fade + weight;
            for (int i = 0; i < SLICE; ++i) sums[g][i] = sums[g][i] * fade + weight * value[i];
        }
    }

    __shared__ float team_sums[TEAMS][HEAD_DIM], team_largest[TEAMS], team_total[TEAMS];
    for (int g = 0; g < GROUP; ++g) {  // one head at a time, which keeps the shared memory small
        for (int i = 0; i < SLICE && !idle; ++i) team_sums[team][feature + i] = sums[g][i];
        if (feature == 0) team_largest[team] = largest[g], team_total[team] = total[g];
        __syncthreads();
        const size_t split = (first_head + g) * splits + blockIdx.x;
        float higher = NOTHING;
        for (int other = 0; other < TEAMS; ++other) higher = fmaxf(higher, team_largest[other]);
        for (int f = thread; f <= HEAD_DIM; f += MAX_WARPS * WARP) {  // the last one is the sum of the weights
            float sum = 0.0f;
            for (int other = 0; other < TEAMS; ++other)
                sum += expf(team_largest[other] - higher) * (f < HEAD_DIM ? team_sums[other][f] : team_total[other]);
            if (f < HEAD_DIM) mixed[split * HEAD_DIM + f] = sum;
            else totals[split] = sum, maxima[split] = higher;
        }
        __syncthreads();
    }
}

extern "C" __global__ void join_splits(
    const float* __restrict__ mixed, const float* __restrict__ maxima, const float* __restrict__ totals,
    float* __restrict__ out, int splits)
{
    const size_t head = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    float higher = NOTHING, sum = 0.0f, total = 0.0f;
    for (int s = 0; s < splits; ++s) higher = fmaxf(higher, maxima[head * splits + s]);
    for (int s = 0; s < splits; ++s) {
        const float weight = expf(maxima[head * splits + s] - higher);
        sum += weight * mixed[(head * splits + s) * HEAD_DIM + threadIdx.x];
        total += weight * totals[head * splits + s];
    }
    out[head * HEAD_DIM + threadIdx.x] = total > 0.0f ? sum / total : 0.0f;
}
