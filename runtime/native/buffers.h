/* How the memory that Python hands over is parted. */

enum { QUERIES = 8 }; /* that a member attends with at a time */

typedef struct { int64_t queries, keys, gate, scores, row, inputs, chunks; } Sizes;

static inline int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

static inline int64_t whole(int64_t floats) { return (floats + 31) / 32 * 32; }

/* Floats of every buffer of a step. */
static inline Sizes sizes_of(const Stack *stack, const Cache *cache, int64_t length, int threads)
{
    int64_t rows = cache->batch * length, width = stack->heads * stack->head_dim;
    int64_t widest = stack->intermediate_size > width ? stack->intermediate_size : width;
    if (stack->hidden_size > widest) widest = stack->hidden_size;
    return (Sizes){
        .queries = rows * width, .keys = rows * stack->key_value_heads * stack->head_dim, .gate = rows * widest,
        .scores = threads * QUERIES * cache->capacity, .row = threads * stack->hidden_size, .inputs = rows * widest,
        .chunks = rows * chunks_of(widest),
    };
}

static inline float *take(float **scratch, int64_t floats)
{
    float *taken = *scratch;
    *scratch += whole(floats);
    return taken;
}

/* count: rows * columns; chunks: rows * chunks_of(columns). */
static inline Inputs take_inputs(float **scratch, int64_t count, int64_t chunks)
{
    int8_t *codes = (int8_t *)take(scratch, (count + 1) / 2);
    float *scales = take(scratch, chunks);
    return (Inputs){codes, scales, (int32_t *)take(scratch, CHUNK / BLOCK * chunks)};
}

static inline int64_t floats_of_inputs(int64_t count, int64_t chunks) { return whole((count + 1) / 2) + whole(chunks) + whole(CHUNK / BLOCK * chunks); }
