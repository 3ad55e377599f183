/* The kernels for AVX2. */

#include "system.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define TILE_ROWS 4
#define RUN_STACK run_stack_avx2
#define RUN_PRODUCT run_product_avx2

#include "buffers.h"
#include "lanes.h"
#include "matmul.h"
#include "attention.h"
#include "stack.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
