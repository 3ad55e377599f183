/* All layers of a decoder, one step: a prompt, or one token of each conversation. */

/* Scale a row [columns] to unit root mean square, times `weight`. */
static void rms_norm(const float *row, const float *weight, int64_t columns, float eps, float *result)
{
    floats squares = {0};
    for (int64_t i = 0; i < columns; i += LANES) squares += read_floats(row + i) * read_floats(row + i);
    float scale = 1 / sqrtf(sum_lanes(squares) / (float)columns + eps);
    for (int64_t i = 0; i < columns; i += LANES)
        write_floats(result + i, read_floats(weight + i) * (read_floats(row + i) * scale));
}

/* Rows as inputs, each normalised first where there is a norm; the team meets afterwards. */
static void prepare(Team *team, const float *rows, int64_t count, int64_t columns, const float *norm, float eps,
                           float *scratch, const Forms *inputs)
{
    for (int64_t row; (row = draw(team)) < count;) {
        const float *own = rows + row * columns;
        if (norm) rms_norm(own, norm, columns, eps, scratch), own = scratch;
        quantize_row(own, row, count, columns, 0, columns, inputs);
    }
    meet(team);
}

/* silu(gate) * up as inputs, in pieces of columns so that a single row is shared too; the team meets afterwards. */
static void prepare_gated(Team *team, float *gate, const float *up, int64_t count, int64_t columns, const Forms *inputs)
{
    enum { PIECE = 512 };
    int64_t pieces = (columns + PIECE - 1) / PIECE;
    for (int64_t piece; (piece = draw(team)) < count * pieces;) {
        int64_t row = piece / pieces, from = piece % pieces * PIECE, size = columns - from < PIECE ? columns - from : PIECE;
        float *own = gate + row * columns + from;
        for (int64_t i = 0; i < size; i += LANES) {
            floats x = read_floats(own + i);
            write_floats(own + i, x / (1.0f + exponential(-x)) * read_floats(up + row * columns + from + i));
        }
        quantize_row(own, row, count, columns, from, size, inputs);
    }
    meet(team);
}

/* A key and a value [size] put into the cache of head `place`; keys lie LANES positions side by side. */
static void keep(const Cache *cache, int64_t place, int64_t position, int64_t size, const float *key, const float *value)
{
    float *keys = (float *)cache->keys + (place * cache->capacity + position / LANES * LANES) * size + position % LANES;
    for (int64_t i = 0; i < size; i++) keys[i * LANES] = key[i];
    memcpy((float *)cache->values + (place * cache->capacity + position) * size, value, sizeof(float) * size);
}

static float scale_of(const float *row, int64_t size)
{
    float largest = 0, nothing = 0;
    for (int64_t i = 0; i < size; i++) {
        largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
        nothing += row[i] - row[i]; /* unless it is no number: that has to be seen */
    }
    return largest / 127.0f + nothing;
}

/* The same, rounded to 8 bits with one scale for each. */
static void keep_in_bytes(const Cache *cache, int64_t place, int64_t position, int64_t size, const float *key, const float *value)
{
    int8_t *keys = (int8_t *)cache->keys + (place * cache->capacity + position / LANES * LANES) * size + position % LANES;
    int8_t *values = (int8_t *)cache->values + (place * cache->capacity + position) * size;
    float key_scale = scale_of(key, size), value_scale = scale_of(value, size);
    for (int64_t i = 0; i < size; i++) {
        keys[i * LANES] = (int8_t)(key_scale > 0 ? lrintf(key[i] / key_scale) : 0);
        values[i] = (int8_t)(value_scale > 0 ? lrintf(value[i] / value_scale) : 0);
    }
    cache->key_scales[place * cache->capacity + position] = key_scale;
    cache->value_scales[place * cache->capacity + position] = value_scale;
}

/* Queries and keys turned, keys and values put into the cache; the team meets afterwards. */
static void fill_cache(Team *team, const Stack *stack, const Layer *layer, const Cache *cache, const Step *step,
                              int64_t index, float *queries, float *keys, const float *values)
{
    int64_t heads = stack->key_value_heads, size = stack->head_dim;
    for (int64_t row; (row = draw(team)) < cache->batch * step->length;) {
        const float *cosines = step->cosines + row * size, *sines = step->sines + row * size;
        int64_t position = step->past + row % step->length, sequence = row / step->length;
        rotate_heads(queries + row * stack->heads * size, stack->heads, size, layer->query_norm, stack->norm_eps, cosines, sines);
        rotate_heads(keys + row * heads * size, heads, size, layer->key_norm, stack->norm_eps, cosines, sines);
        for (int64_t head = 0; head < heads; head++) {
            int64_t place = (index * cache->batch + sequence) * heads + head, from = (row * heads + head) * size;
            if (cache->key_scales) keep_in_bytes(cache, place, position, size, keys + from, values + from);
            else keep(cache, place, position, size, keys + from, values + from);
        }
    }
    meet(team);
}

/* What every member works on; the buffers are sized by `sizes_of`. */
typedef struct {
    const Stack *stack;
    const Cache *cache;
    const Step *step;
    Forms inputs;
    float *queries, *keys, *values, *gate, *up, *scores, *row;
} Run;

static void run_member(Team *team, int member, void *argument)
{
    Run *run = argument;
    const Stack *stack = run->stack;
    const Step *step = run->step;
    const int64_t rows = run->cache->batch * step->length, hidden = stack->hidden_size, width = stack->heads * stack->head_dim;
    float *scratch = run->row + member * hidden;
    Attended attended = {run->queries, run->gate, run->scores + member * QUERIES * scores_width(run->cache)};
    for (int64_t index = 0; index < stack->layer_count; index++) {
        const Layer *layer = stack->layers + index;
        const Matrix *first[] = {&layer->query, &layer->key, &layer->value}, *second[] = {&layer->output};
        const Matrix *third[] = {&layer->gate, &layer->up}, *fourth[] = {&layer->down};
        Forms inputs = forms_for(&run->inputs, first, 3);
        prepare(team, step->hidden, rows, hidden, layer->input_norm, stack->norm_eps, scratch, &inputs);
        multiply(team, first, (float *[]){run->queries, run->keys, run->values}, 3, &inputs, rows, 0);
        fill_cache(team, stack, layer, run->cache, step, index, run->queries, run->keys, run->values);
        attend_all(team, stack, run->cache, step, index, &attended);
        inputs = forms_for(&run->inputs, second, 1);
        prepare(team, run->gate, rows, width, NULL, 0, NULL, &inputs);
        multiply(team, second, &step->hidden, 1, &inputs, rows, 1);
        inputs = forms_for(&run->inputs, third, 2);
        prepare(team, step->hidden, rows, hidden, layer->post_norm, stack->norm_eps, scratch, &inputs);
        multiply(team, third, (float *[]){run->gate, run->up}, 2, &inputs, rows, 0);
        inputs = forms_for(&run->inputs, fourth, 1);
        prepare_gated(team, run->gate, run->up, rows, stack->intermediate_size, &inputs);
        multiply(team, fourth, &step->hidden, 1, &inputs, rows, 1);
    }
    if (!step->logits) return;
    const Matrix *last[] = {&stack->head};
    Forms inputs = forms_for(&run->inputs, last, 1);
    prepare(team, step->hidden, rows, hidden, stack->norm, stack->norm_eps, scratch, &inputs);
    multiply(team, last, &step->logits, 1, &inputs, rows, 0);
}

typedef struct {
    const Matrix *matrix;
    const float *values;
    float *outputs;
    int64_t rows;
    Forms inputs;
} Product;

static void multiply_member(Team *team, int member, void *argument)
{
    Product *of = argument;
    (void)member;
    prepare(team, of->values, of->rows, of->matrix->columns, NULL, 0, NULL, &of->inputs);
    multiply(team, &of->matrix, &of->outputs, 1, &of->inputs, of->rows, 0);
}

/* Transform the hidden states of a step in place, fill the cache, and compute logits where they are wanted. */
void RUN_STACK(Team *team, const Stack *stack, const Cache *cache, const Step *step, float *scratch)
{
    Run run = {.stack = stack, .cache = cache, .step = step};
    Sizes size = sizes_of(stack, cache, step->length, team->size);
    run.queries = take(&scratch, size.queries);
    run.keys = take(&scratch, size.keys);
    run.values = take(&scratch, size.keys);
    run.gate = take(&scratch, size.gate);
    run.up = take(&scratch, size.gate);
    run.scores = take(&scratch, size.scores);
    run.row = take(&scratch, size.row);
    run.inputs = take_forms(&scratch, size.inputs);
    work(team, run_member, &run);
}

/* outputs [rows][matrix rows] of values [rows][columns]. */
void RUN_PRODUCT(Team *team, const Matrix *matrix, const float *values, int64_t rows, float *outputs, float *scratch)
{
    Forms buffers = take_forms(&scratch, rows * matrix->columns);
    Product of = {matrix, values, outputs, rows, forms_for(&buffers, &matrix, 1)};
    work(team, multiply_member, &of);
}
