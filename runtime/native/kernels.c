/* What Python calls. The processor chooses between the two compilations of the same source: vnni.c and avx2.c.

   Python (runtime/native.py) hands over every buffer; nothing is allocated here but threads. Fast because weights are
   read once per token, packed, and one team of threads does everything from one token to the next. */

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cpuid.h>

#include "system.h"
#include "buffers.h"

void run_stack_vnni(Team *, const Stack *, const Cache *, const Step *, float *);
void run_stack_avx2(Team *, const Stack *, const Cache *, const Step *, float *);
void run_product_vnni(Team *, const Matrix *, const float *, int64_t, float *, float *);
void run_product_avx2(Team *, const Matrix *, const float *, int64_t, float *, float *);

static Team *team;

/* What these sources take: a library of older ones would read memory wrongly. */
int vlquant_layout(void) { return LAYOUT; }

/* 2: AVX-512 with VNNI, 1: AVX2, 0: neither, nothing here may be called. All that vnni.c and avx2.c are compiled for. */
int vlquant_instructions(void)
{
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return 0; /* GCC knows the name of this one from 11 on only */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") ? 2 : 1;
}

/* Have so many threads from now on; 0 if the system gives them. */
int vlquant_threads(int size)
{
    if (!team || team->owner != getpid()) team = new_team(); /* the threads of an old one stayed in the process before the fork */
    return team ? resize(team, size) : -1;
}

int64_t vlquant_stack_scratch(const Stack *stack, const Cache *cache, int64_t length)
{
    Sizes size = sizes_of(stack, cache, length, team->size);
    return whole(size.queries) + 2 * whole(size.keys) + 2 * whole(size.gate) + whole(size.scores) + whole(size.row)
        + floats_of_forms(size.inputs);
}

int64_t vlquant_product_scratch(const Matrix *matrix, int64_t rows)
{
    return floats_of_forms(rows * matrix->columns);
}

/* instructions: as found above, or fewer. */
void vlquant_run_stack(int instructions, const Stack *stack, const Cache *cache, const Step *step, float *scratch)
{
    if (instructions == 2) run_stack_vnni(team, stack, cache, step, scratch);
    else run_stack_avx2(team, stack, cache, step, scratch);
}

void vlquant_run_product(int instructions, const Matrix *matrix, const float *values, int64_t rows, float *outputs,
                         float *scratch)
{
    if (instructions == 2) run_product_vnni(team, matrix, values, rows, outputs, scratch);
    else run_product_avx2(team, matrix, values, rows, outputs, scratch);
}

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_size = -1};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
