/* The kernels for AVX-512 with its integer dot product. */

#include "system.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define WITH_VNNI
#define LANES 16
#define TILE_ROWS 16
#define RUN_STACK run_stack_vnni
#define RUN_PRODUCT run_product_vnni

#include "buffers.h"
#include "lanes.h"
#include "matmul.h"
#include "attention.h"
#include "stack.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
