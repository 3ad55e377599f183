/* Grouped-query attention over the cache.

   A piece of work is up to eight queries that share a key head: heads of its group, then heads of the next position.
   Keys lie LANES positions side by side, so that their scores need no sum over lanes. */

/* Queries or keys [heads * head_dim] of one row normalised, where there is a norm, and turned, in place. */
static void rotate_heads(float *rows, int64_t heads, int64_t head_dim, const float *norm, float eps,
                                const float *cosines, const float *sines)
{
    for (int64_t head = 0; head < heads; head++) {
        float *x = rows + head * head_dim, scale = 1;
        if (norm) {
            float squares = 0;
            for (int64_t i = 0; i < head_dim; i++) squares += x[i] * x[i];
            scale = 1 / sqrtf(squares / (float)head_dim + eps);
            for (int64_t i = 0; i < head_dim; i++) x[i] = norm[i] * (x[i] * scale);
        }
        for (int64_t i = 0; i < head_dim / 2; i++) {
            float first = x[i], second = x[i + head_dim / 2];
            x[i] = first * cosines[i] - second * sines[i];
            x[i + head_dim / 2] = second * cosines[i + head_dim / 2] + first * sines[i + head_dim / 2];
        }
    }
}

/* One head of one conversation in the cache. */
typedef struct {
    const void *keys, *values;
    const float *key_scales, *value_scales;
    int64_t head_dim, width, start; /* width: floats for the scores of a query */
} Head;

/* scores[q][position] of `count` queries [head_dim] for the positions up to `stop`, in whole blocks of lanes. */
INLINE void score(const Head *head, const float *const *queries, int64_t stop, float *scores, const int count, const int in_bytes)
{
    for (int64_t block = head->start / LANES; block * LANES < stop; block++) {
        floats found[count];
        for (int q = 0; q < count; q++) found[q] = (floats){0};
        for (int64_t i = 0; i < head->head_dim; i++) {
            floats key = read_cached(head->keys, (block * head->head_dim + i) * LANES, in_bytes);
            for (int q = 0; q < count; q++) found[q] += key * queries[q][i];
        }
        for (int q = 0; q < count; q++) {
            if (in_bytes) found[q] *= read_floats(head->key_scales + block * LANES);
            write_floats(scores + q * head->width + block * LANES, found[q]);
        }
    }
}

/* Softmax of scores[0..stop) times `scale`, in place, not yet divided by the returned sum; zeros from there to `to`.
   Lanes are counted from the conversation's own first position: sums are the same whatever is padded before it. */
static float soften(float *scores, int64_t stop, int64_t to, float scale)
{
    int64_t end = (to + LANES - 1) / LANES * LANES;
    for (int64_t i = stop; i < end; i++) scores[i] = -INFINITY;
    floats most = all_floats(-INFINITY), sums = {0};
    for (int64_t i = 0; i < end; i += LANES) most = larger(most, read_floats(scores + i));
    floats top = all_floats(largest_lane(most) * scale);
    for (int64_t i = 0; i < end; i += LANES) {
        floats own = exponential(read_floats(scores + i) * scale - top);
        write_floats(scores + i, own);
        sums += own;
    }
    for (int64_t i = stop; i < end; i++) scores[i] = 0;
    return sum_lanes(sums);
}

/* Values weighed by scores, two registers of features of `count` queries at a time. */
INLINE void mix(const Head *head, const float *scores, int64_t stop, const float *sums, float *const *outputs, const int count,
                const int in_bytes)
{
    for (int64_t feature = 0; feature < head->head_dim; feature += 2 * LANES) {
        const int pair = feature + 2 * LANES <= head->head_dim;
        floats low[count], high[count];
        for (int q = 0; q < count; q++) low[q] = high[q] = (floats){0};
        for (int64_t position = head->start; position < stop; position++) {
            int64_t place = position * head->head_dim + feature;
            floats first = read_cached(head->values, place, in_bytes);
            floats second = pair ? read_cached(head->values, place + LANES, in_bytes) : (floats){0};
            for (int q = 0; q < count; q++) {
                float share = scores[q * head->width + position];
                if (in_bytes) share *= head->value_scales[position];
                low[q] += first * share;
                high[q] += second * share;
            }
        }
        for (int q = 0; q < count; q++) {
            write_floats(outputs[q] + feature, low[q] / sums[q]);
            if (pair) write_floats(outputs[q] + feature + LANES, high[q] / sums[q]);
        }
    }
}

INLINE void attend(const Head *head, const float *const *queries, float *const *outputs, const int64_t *stops, float *scores,
                   const int count, const int in_bytes)
{
    int64_t last = stops[count - 1], start = head->start;
    float sums[count], scale = 1 / sqrtf((float)head->head_dim);
    score(head, queries, last, scores, count, in_bytes);
    for (int q = 0; q < count; q++) sums[q] = soften(scores + q * head->width + start, stops[q] - start, last - start, scale);
    mix(head, scores, last, sums, outputs, count, in_bytes);
}

/* As many queries at a time as there are, eight at most. */
INLINE void attend_some(const Head *head, const float *const *queries, float *const *outputs, const int64_t *stops,
                        float *scores, int queries_left, const int in_bytes)
{
    int done = 0;
    #define ATTEND(n) \
        for (; queries_left - done >= n; done += n) \
            attend(head, queries + done, outputs + done, stops + done, scores, n, in_bytes);
    ATTEND(8) ATTEND(7) ATTEND(4) ATTEND(2) ATTEND(1)
    #undef ATTEND
}

typedef struct {
    const float *queries; /* [batch * length][heads * head_dim] */
    float *outputs;       /* the same */
    float *scores;        /* of this member: [QUERIES][scores_width] */
} Attended;

/* A share of the attention of one layer; the team meets afterwards. */
static void attend_all(Team *team, const Stack *stack, const Cache *cache, const Step *step, int64_t layer,
                              const Attended *of)
{
    const int64_t heads = stack->key_value_heads, group = stack->heads / heads, width = stack->heads * stack->head_dim;
    const int64_t per_head = (step->length * group + QUERIES - 1) / QUERIES, area = cache->capacity * stack->head_dim;
    for (;;) {
        /* The longest first: pieces at the end of a prompt see the most. */
        int64_t piece = draw(team), pieces = cache->batch * heads * per_head;
        if (piece >= pieces) break;
        piece = pieces - 1 - piece;
        int64_t sequence = piece % cache->batch, head = piece / cache->batch % heads;
        int64_t first = piece / cache->batch / heads * QUERIES, start = step->starts[sequence];
        const float *queries[QUERIES];
        float *outputs[QUERIES];
        int64_t stops[QUERIES], place = (layer * cache->batch + sequence) * heads + head;
        int count = 0;
        for (int64_t i = first; i < step->length * group && count < QUERIES; i++) {
            int64_t row = sequence * step->length + i / group, offset = row * width + (head * group + i % group) * stack->head_dim;
            if (step->past + i / group < start) {
                memset(of->outputs + offset, 0, sizeof(float) * stack->head_dim); /* padding: nobody reads it */
                continue;
            }
            queries[count] = of->queries + offset;
            outputs[count] = of->outputs + offset;
            stops[count++] = step->past + i / group + 1;
        }
        Head own = {.head_dim = stack->head_dim, .width = scores_width(cache), .start = start};
        if (cache->key_scales) {
            own.keys = (const int8_t *)cache->keys + place * area;
            own.values = (const int8_t *)cache->values + place * area;
            own.key_scales = cache->key_scales + place * cache->capacity;
            own.value_scales = cache->value_scales + place * cache->capacity;
            attend_some(&own, queries, outputs, stops, of->scores, count, 1);
        } else {
            own.keys = (const float *)cache->keys + place * area;
            own.values = (const float *)cache->values + place * area;
            attend_some(&own, queries, outputs, stops, of->scores, count, 0);
        }
    }
    meet(team);
}
