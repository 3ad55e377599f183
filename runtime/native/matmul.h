/* Packed codes times inputs in twice as many bits, for any number of rows of inputs.

   A panel holds 16 rows of a matrix; a register holds 4 columns of each of them, so a sum of products needs no sum over
   lanes. Inputs have one scale for 32 of them: bytes beside codes of 4 bits, which cost fifty times as much; beside codes of
   8 bits, 255 * coarse + fine, both bytes, which leaves results those of float inputs. */

/* How far ahead several rows fetch: the processor does so to the end of a page only, and they took 1.2 times as long. A single
   row is as fast without. */
enum { RADIX = 255, AHEAD = 2048 };

/* Rows of inputs lie in groups of TILE_ROWS, the last ones of halves of that, side by side block by block: a tile reads on. */
typedef struct { int64_t start, size; } Group;

static inline Group group_of(int64_t row, int64_t rows)
{
    int64_t start = 0, size = TILE_ROWS;
    while (row >= start + (rows - start) / size * size) {
        start += (rows - start) / size * size;
        size /= 2;
    }
    return (Group){start + (row - start) / size * size, size};
}

/* Inputs [from, from + count) of one row of `rows`: nearest integers to value / scale, the largest of 32 being the largest there is. */
INLINE void quantize_blocks(const float *values, int64_t row, int64_t rows, int64_t columns, int64_t from, int64_t count,
                            const Inputs *inputs, const int wide)
{
    const float largest_code = wide ? RADIX * 127 + 127 : 127;
    Group group = group_of(row, rows);
    for (int64_t block = from / BLOCK; block < (from + count) / BLOCK; block++, values += BLOCK) {
        int64_t place = group.start * (columns / BLOCK) + block * group.size + row - group.start;
        int8_t *codes = inputs->codes + place * BLOCK * (1 + wide);
        floats most = {0}, nothing = {0};
        for (int i = 0; i < BLOCK; i += LANES) {
            floats own = read_floats(values + i);
            most = larger(most, larger(own, -own));
            nothing += own - own; /* unless it is no number: that has to be seen */
        }
        float largest = largest_lane(most), inverse = largest > 0 ? largest_code / largest : 0.0f;
        ints sum = {0};
        for (int i = 0; i < BLOCK; i += LANES) {
            floats code = nearest(read_floats(values + i) * inverse), high = nearest(code * (1.0f / RADIX));
            write_bytes(codes + i, to_bytes(wide ? code - high * RADIX : code));
            if (wide) write_bytes(codes + BLOCK + i, to_bytes(high));
            sum += __builtin_convertvector(code, ints);
        }
        inputs->starts[place] = -(wide ? WIDE_ZERO : 8) * sum_ints(sum);
        inputs->scales[place] = largest / largest_code + sum_lanes(nothing);
    }
}

/* The same in the forms that are wanted. */
static void quantize_row(const float *values, int64_t row, int64_t rows, int64_t columns, int64_t from, int64_t count,
                         const Forms *forms)
{
    if (forms->wants_narrow) quantize_blocks(values, row, rows, columns, from, count, &forms->narrow, 0);
    if (forms->wants_wide) quantize_blocks(values, row, rows, columns, from, count, &forms->wide, 1);
}

/* One block of 32 columns: four columns of LANES rows to a register. */
INLINE void unpack_block(const uint8_t *codes, const int wide, bytes *weights)
{
    for (int quad = 0; quad < (wide ? QUADS : QUADS / 2); quad++) {
        bytes own = read_bytes(codes + 4 * PANEL * quad);
        weights[quad] = wide ? own : own & 15;
        if (!wide) weights[quad + QUADS / 2] = (bytes)(((ints)own >> 4) & 0x0f0f0f0f);
    }
}

/* Outputs of LANES rows of a matrix, from row LANES * part on, for a group of `rows` rows of inputs, a constant where inlined. */
INLINE void tile(const Matrix *matrix, const Inputs *inputs, int64_t part, int64_t row, const int rows, const int wide,
                 floats *totals)
{
    const int64_t blocks = matrix->columns / BLOCK, per_group = matrix->group_size / BLOCK, groups = blocks / per_group;
    const int64_t block_bytes = PANEL * BLOCK / (wide ? 1 : 2), panel = part / PARTS, half = part % PARTS * LANES;
    const uint8_t *codes = matrix->codes + panel * blocks * block_bytes + half * 4;
    const uint16_t *weight_scales = matrix->scales + panel * groups * PANEL + half;
    const int8_t *own = inputs->codes + row * matrix->columns * (1 + wide);
    const float *scales = inputs->scales + row * blocks;
    const int32_t *starts = inputs->starts + row * blocks;
    UNROLLED for (int r = 0; r < rows; r++) totals[r] = (floats){0};
    for (int64_t group = 0; group < groups; group++) {
        floats sums[TILE_ROWS];
        UNROLLED for (int r = 0; r < rows; r++) sums[r] = (floats){0};
        for (int64_t block = 0; block < per_group; block++, codes += block_bytes, scales += rows, starts += rows) {
            bytes weights[QUADS];
            if (rows > 1) for (int64_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(codes + line + AHEAD);
            unpack_block(codes, wide, weights);
            UNROLLED for (int r = 0; r < rows; r++, own += BLOCK * (1 + wide)) {
                ints sum = dot_block(all_ints(starts[r]), weights, own, wide);
                if (wide) sum += RADIX * dot_block((ints){0}, weights, own + BLOCK, wide);
                sums[r] += to_floats(sum) * scales[r];
            }
        }
        floats weight_scale = read_halves(weight_scales + group * PANEL);
        UNROLLED for (int r = 0; r < rows; r++) totals[r] += sums[r] * weight_scale;
    }
}

INLINE void store_tile(const Matrix *matrix, const Inputs *inputs, float *outputs, int64_t part, int64_t row, const int rows,
                       const int wide, int added)
{
    floats totals[TILE_ROWS];
    tile(matrix, inputs, part, row, rows, wide, totals);
    UNROLLED for (int r = 0; r < rows; r++) {
        float *place = outputs + (row + r) * matrix->rows + part * LANES;
        totals[r] *= matrix->factor;
        if (matrix->bias) totals[r] += read_floats(matrix->bias + part * LANES);
        if (added) totals[r] += read_floats(place);
        write_floats(place, totals[r]);
    }
}

/* A strip of panels for some rows, group by group; it lies in the nearest caches after the first. */
static void strip(const Matrix *matrix, const Inputs *inputs, float *outputs, int64_t panel, int64_t stop, int64_t row,
                  int64_t rows, const int wide, int added)
{
    #define TILES(size) \
        for (; size <= TILE_ROWS && rows >= size; rows -= size, row += size) \
            for (int64_t part = panel * PARTS; part < stop * PARTS; part++) \
                store_tile(matrix, inputs, outputs, part, row, size, wide, added);
    TILES(16) TILES(8) TILES(4) TILES(2) TILES(1)
    #undef TILES
}

/* Panels of a piece of work: of many rows of inputs as many as stay in the nearest caches, of few a long run, a share for
   each member or several, since memory gives up to a third more in runs of 256 KiB than in runs of 50. */
static int64_t panels_at_once(const Team *team, const Matrix *matrix, int64_t panels, int64_t rows)
{
    enum { NEAR = 8, RUN = 256 * 1024, MOST_SHARES = 4 };
    if (rows > TILE_ROWS) return NEAR;
    int64_t shares = panels * PANEL * matrix->columns * matrix->bits / 8 / RUN / team->size;
    shares = shares < 1 ? 1 : shares > MOST_SHARES ? MOST_SHARES : shares;
    return (panels + team->size * shares - 1) / (team->size * shares);
}

/* A share of outputs = inputs @ matrix.T for several matrices with the same inputs; the team meets afterwards. */
static void multiply(Team *team, const Matrix *const *matrices, float *const *outputs, int count,
                            const Forms *inputs, int64_t rows, int added)
{
    enum { ROWS_AT_ONCE = 48 };
    int64_t panels = 0;
    for (int which = 0; which < count; which++) panels += matrices[which]->rows / PANEL;
    int64_t run = panels_at_once(team, *matrices, panels, rows), runs = (panels + run - 1) / run;
    for (int64_t piece; (piece = draw(team)) < runs * ((rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);) {
        int64_t row = piece / runs * ROWS_AT_ONCE, some = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
        int64_t from = piece % runs * run, before = 0; /* in all matrices, one after the other */
        for (int which = 0; which < count; before += matrices[which++]->rows / PANEL) {
            const Matrix *matrix = matrices[which];
            int64_t own = matrix->rows / PANEL, start = from > before ? from - before : 0, stop = from + run - before;
            if (stop > own) stop = own;
            if (matrix->bits == 8) strip(matrix, &inputs->wide, outputs[which], start, stop, row, some, 1, added);
            else strip(matrix, &inputs->narrow, outputs[which], start, stop, row, some, 0, added);
        }
    }
    meet(team);
}
