// What CUDA gives a kernel, for one CPU thread: the same source text then runs without a GPU.
//
// Every thread of a block is a fiber. At a barrier or an exchange between lanes it waits until all have come; if nobody can
// go on, because lanes of a warp have parted, that is an error here as it is undefined on a GPU.

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__ __restrict

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { int x, y, z; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }

inline float widen(unsigned short bits) { _Float16 half; memcpy(&half, &bits, 2); return (float)half; }

inline unsigned short narrow(float wide) { _Float16 half = (_Float16)wide; unsigned short bits; memcpy(&bits, &half, 2); return bits; }

// Byte s of the result is the one that half byte s of the selector names: 0-3 of the first word, 4-7 of the second.
inline unsigned __byte_perm(unsigned first, unsigned second, unsigned selector)
{
    const uint64_t both = first | (uint64_t)second << 32;
    unsigned result = 0;
    for (int s = 0; s < 4; ++s) result |= (unsigned)(both >> 8 * (selector >> 4 * s & 7) & 255) << 8 * s;
    return result;
}

inline int __dp4a(int a, int b, int sum)
{
    for (int s = 0; s < 32; s += 8) sum += (int8_t)(a >> s) * (int8_t)(b >> s);
    return sum;
}

// Started once by a context, later resumed by a jump, which needs no system call.
struct Fiber { ucontext_t context; jmp_buf jump; std::vector<char> stack; dim3 index; bool started, finished; };
struct Meeting { int members = 0, arrived = 0, round = 0; float values[2][32]; };

static Fiber fibers[1024];
static std::vector<Meeting> warps;
static Meeting block;
static jmp_buf scheduler;
static int current;
static bool progress;

static __attribute__((noinline)) void pause_fiber()
{
    if (!_setjmp(fibers[current].jump)) _longjmp(scheduler, 1);
}

static __attribute__((noinline)) void resume_fiber()
{
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

static void meet(Meeting& meeting)
{
    const int round = meeting.round;
    progress = true;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
    }
    while (meeting.round == round) pause_fiber();
    threadIdx = fibers[current].index;
}

inline void __syncthreads() { meet(block); }

inline float __shfl_xor_sync(unsigned mask, float value, int distance)
{
    if (mask != 0xffffffffu) abort();
    Meeting& warp = warps[current / 32];
    float* values = warp.values[warp.round & 1];  // the next exchange uses the other half
    const int lane = current % 32;
    values[lane] = value;
    meet(warp);
    return values[lane ^ distance];
}

template <typename... Arguments, size_t... Index>
static void call(void (*kernel)(Arguments...), void** parameters, std::index_sequence<Index...>)
{
    kernel(*(Arguments*)parameters[Index]...);
}

static void (*body)(void**);
static void** body_parameters;

static void run_fiber()
{
    for (;;) {  // one block after another
        threadIdx = fibers[current].index;
        body(body_parameters);
        fibers[current].finished = progress = true;
        pause_fiber();
    }
}

// Returns 0, or 1 if threads waited for each other in vain.
static int run_block()
{
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    warps.assign((threads + 31) / 32, Meeting());
    for (auto& warp : warps) warp.members = 32;
    block = Meeting();
    block.members = threads;
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        fiber.finished = false;
        if (fiber.started) continue;
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (int left = threads; left;) {
        progress = false;
        left = 0;
        for (int turn = 0; turn < threads; ++turn) {
#ifdef BACKWARDS
            current = threads - 1 - turn;
#else
            current = turn;
#endif
            if (!fibers[current].finished) resume_fiber();
            left += !fibers[current].finished;
        }
        if (!progress) {
            for (Fiber& fiber : fibers) fiber.started = false;
            return 1;
        }
    }
    return 0;
}

static int run_grid(const int* grid, const int* block_shape, void** parameters, void (*kernel)(void**))
{
    body = kernel, body_parameters = parameters;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block_shape[0], block_shape[1], block_shape[2]};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
                if (run_block()) return 1;
    return 0;
}

template <typename... Arguments>
static void unpack_and_call(void (*kernel)(Arguments...), void** parameters)
{
    call(kernel, parameters, std::index_sequence_for<Arguments...>());
}

#define ON_CPU(NAME)                                                                                   \
    extern "C" int run_##NAME(const int* grid, const int* block_shape, void** parameters)              \
    {                                                                                                  \
        return run_grid(grid, block_shape, parameters, [](void** p) { unpack_and_call(NAME, p); });    \
    }
