// What all kernels share. No header is included: NVRTC comes without any. The files of a module are compiled as one text.
//
// Plain C++ in everything but the few lines under __CUDACC__, so that tests/kernels_on_cpu.cpp can run the very same text.
// No arithmetic in half precision anywhere: on sm_61 it runs at 1/64 of full rate. Halves are stored and loaded only.

typedef unsigned short half_bits;
typedef unsigned int word;

static const int WARP = 32;
static const int MAX_WARPS = 4;  // of a block

#ifdef __CUDACC__
__device__ __forceinline__ float widen(half_bits half)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
    return wide;
}

__device__ __forceinline__ half_bits narrow(float wide)
{
    half_bits half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(wide));
    return half;
}
#endif

__device__ __forceinline__ float widen(float wide) { return wide; }

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// The sum over aligned teams of `lanes` lanes of a warp, in every one of them. All 32 lanes have to come here.
__device__ __forceinline__ float team_sum(float value, int lanes = WARP)
{
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ __forceinline__ float warp_largest(float value)
{
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}
