/* How the memory that Python hands over is parted. */

enum { QUERIES = 8 }; /* that a member attends with at a time */

typedef struct { int64_t queries, keys, gate, scores, row, inputs; } Sizes;

static inline int64_t whole(int64_t floats) { return (floats + 31) / 32 * 32; }

/* Floats for the scores of one query: registers full of them may begin at any position. */
static inline int64_t scores_width(const Cache *cache) { return cache->capacity + PANEL; }

/* Floats of every buffer of a step. */
static inline Sizes sizes_of(const Stack *stack, const Cache *cache, int64_t length, int threads)
{
    int64_t rows = cache->batch * length, width = stack->heads * stack->head_dim;
    int64_t widest = stack->intermediate_size > width ? stack->intermediate_size : width;
    if (stack->hidden_size > widest) widest = stack->hidden_size;
    if (!stack->layer_count) return (Sizes){.row = threads * stack->hidden_size, .inputs = rows * stack->hidden_size};
    return (Sizes){
        .queries = rows * width, .keys = rows * stack->key_value_heads * stack->head_dim, .gate = rows * widest,
        .scores = threads * QUERIES * scores_width(cache), .row = threads * stack->hidden_size, .inputs = rows * widest,
    };
}

static inline float *take(float **scratch, int64_t floats)
{
    float *taken = *scratch;
    *scratch += whole(floats);
    return taken;
}

/* count: rows * columns. */
static inline Inputs take_inputs(float **scratch, int64_t count, int bytes)
{
    int8_t *codes = (int8_t *)take(scratch, count / 4 * bytes);
    float *scales = take(scratch, count / BLOCK);
    return (Inputs){codes, scales, (int32_t *)take(scratch, count / BLOCK)};
}

static inline Forms take_forms(float **scratch, int64_t count)
{
    Inputs narrow = take_inputs(scratch, count, 1);
    return (Forms){narrow, take_inputs(scratch, count, 2), 0, 0};
}

static inline int64_t floats_of_forms(int64_t count) { return whole(count / 4) + whole(count / 2) + 4 * whole(count / BLOCK); }

/* The forms that some matrices with the same inputs want. */
static inline Forms forms_for(const Forms *buffers, const Matrix *const *matrices, int count)
{
    Forms forms = *buffers;
    for (int i = 0; i < count; i++) {
        if (matrices[i]->bits == 8) forms.wants_wide = 1;
        else forms.wants_narrow = 1;
    }
    return forms;
}
