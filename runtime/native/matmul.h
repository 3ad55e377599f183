/* Inputs in 16 bits times packed codes, for any number of rows of inputs.

   A panel holds 16 rows of a matrix; a register holds 4 columns of each of them, so a sum of products needs no sum over
   lanes. An input is 255 * coarse + fine, both bytes, with one scale for 128 of them: how fast weights come from memory
   decides what a single row takes, so the second product costs little there, and results are those of float inputs. */

/* Arrays of registers stay in registers only where the loops over them are gone. */
#define UNROLLED _Pragma("GCC unroll 8")

enum { RADIX = 255, LARGEST = RADIX * 127 + 127 };

/* Rows of inputs lie in groups of TILE_ROWS, the last ones of halves of that, side by side quad by quad: a tile reads one line. */
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

/* Inputs [from, from + count) of one row of `rows`: nearest integers to value / scale, scale = largest of 128 / LARGEST. */
static void quantize_row(const float *values, int64_t row, int64_t rows, int64_t columns, int64_t from, int64_t count,
                         const Inputs *inputs)
{
    Group group = group_of(row, rows);
    int8_t *codes = inputs->codes + 2 * group.start * columns + 8 * (row - group.start);
    float *scales = inputs->scales + row * chunks_of(columns);
    int32_t *sums = inputs->sums + row * chunks_of(columns) * (CHUNK / BLOCK);
    for (int64_t start = from; start < from + count; start += CHUNK) {
        int64_t stop = start + CHUNK < from + count ? start + CHUNK : from + count;
        const float *own = values - from;
        floats most = {0}, nothing = {0};
        for (int64_t i = start; i < stop; i += LANES) {
            most = larger(most, larger(read_floats(own + i), -read_floats(own + i)));
            nothing += read_floats(own + i) - read_floats(own + i); /* unless it is no number: that has to be seen */
        }
        float largest = largest_lane(most), inverse = largest > 0 ? LARGEST / largest : 0.0f;
        ints sum = {0};
        int32_t so_far = 0;
        for (int64_t i = start; i < stop; i += LANES) {
            floats code = nearest(read_floats(own + i) * inverse), high = nearest(code * (1.0f / RADIX));
            few_bytes coarse = to_bytes(high), fine = to_bytes(code - high * RADIX);
            for (int lane = 0; lane < LANES; lane += 4) {
                int8_t *place = codes + (i + lane) / 4 * 8 * group.size;
                memcpy(place, (int8_t *)&coarse + lane, 4);
                memcpy(place + 4, (int8_t *)&fine + lane, 4);
            }
            sum += __builtin_convertvector(code, ints);
            if (i % BLOCK == BLOCK - LANES) {
                sums[i / BLOCK] = so_far += sum_ints(sum);
                sum = (ints){0};
            }
        }
        scales[start / CHUNK] = largest / LARGEST + sum_lanes(nothing);
    }
}

/* Add the products of one block of 32 columns: LANES rows of a matrix, a group of `rows` rows of inputs. */
INLINE void multiply_block(const uint8_t *codes, const int8_t *inputs, const int rows, const int wide, ints *high, ints *low)
{
    for (int quad = 0; quad < (wide ? 8 : 4); quad++) {
        bytes own = read_bytes(codes + 4 * PANEL * quad), first = wide ? own : own & 15;
        UNROLLED for (int r = 0; r < rows; r++) {
            high[r] = dot(high[r], first, four_bytes(inputs + 8 * (quad * rows + r)), wide);
            low[r] = dot(low[r], first, four_bytes(inputs + 8 * (quad * rows + r) + 4), wide);
        }
        if (wide) continue;
        bytes second = (bytes)(((ints)own >> 4) & 0x0f0f0f0f);
        UNROLLED for (int r = 0; r < rows; r++) {
            high[r] = dot(high[r], second, four_bytes(inputs + 8 * ((quad + 4) * rows + r)), 0);
            low[r] = dot(low[r], second, four_bytes(inputs + 8 * ((quad + 4) * rows + r) + 4), 0);
        }
    }
}

/* Outputs of LANES rows of a matrix, from row LANES * part on, for a group of `rows` rows of inputs, a constant where inlined. */
INLINE void tile(const Matrix *matrix, const Inputs *inputs, int64_t part, int64_t row, const int rows, const int wide,
                 floats *totals)
{
    const int64_t columns = matrix->columns, blocks = columns / BLOCK, per_group = matrix->group_size / BLOCK;
    const int64_t groups = blocks / per_group, block_bytes = PANEL * BLOCK / (wide ? 1 : 2), chunks = chunks_of(columns);
    const int64_t panel = part / PARTS, half = part % PARTS * LANES;
    const uint8_t *codes = matrix->codes + panel * blocks * block_bytes + half * 4;
    const uint16_t *scales = matrix->scales + panel * groups * PANEL + half;
    UNROLLED for (int r = 0; r < rows; r++) totals[r] = (floats){0};
    for (int64_t block = 0; block < blocks;) {
        /* As far as neither the scale of the weights nor that of the inputs changes. */
        int64_t group = block / per_group, chunk = block / (CHUNK / BLOCK), stop = blocks;
        if ((group + 1) * per_group < stop) stop = (group + 1) * per_group;
        if ((chunk + 1) * (CHUNK / BLOCK) < stop) stop = (chunk + 1) * (CHUNK / BLOCK);
        ints high[TILE_ROWS], low[TILE_ROWS];
        const int32_t *sums = inputs->sums + row * chunks * (CHUNK / BLOCK);
        UNROLLED for (int r = 0; r < rows; r++, sums += chunks * (CHUNK / BLOCK)) {
            int32_t sum = sums[stop - 1] - (block % (CHUNK / BLOCK) ? sums[block - 1] : 0);
            high[r] = (ints){0}, low[r] = all_ints(-(wide ? WIDE_ZERO : 8) * sum);
        }
        for (; block < stop; block++)
            multiply_block(codes + block * block_bytes, inputs->codes + 2 * (row * columns + block * BLOCK * rows), rows, wide, high, low);
        floats weight_scale = read_halves(scales + group * PANEL);
        UNROLLED for (int r = 0; r < rows; r++) {
            ints sum = (high[r] << 8) - high[r] + low[r]; /* RADIX times the high one */
            totals[r] += to_floats(sum) * (inputs->scales[(row + r) * chunks + chunk] * weight_scale);
        }
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
        for (; rows >= size; rows -= size, row += size) \
            for (int64_t part = panel * PARTS; part < stop * PARTS; part++) \
                store_tile(matrix, inputs, outputs, part, row, size, wide, added);
    TILES(TILE_ROWS) TILES(TILE_ROWS / 2) TILES(TILE_ROWS / 4) TILES(1)
    #undef TILES
}

/* A share of outputs = inputs @ matrix.T for several matrices with the same inputs; the team meets afterwards. */
static void multiply(Team *team, const Matrix *const *matrices, float *const *outputs, int count,
                            const Inputs *inputs, int64_t rows, int added)
{
    enum { STRIP = 8, ROWS_AT_ONCE = 48 };
    for (;;) {
        int64_t piece = draw(team), which = 0;
        for (; which < count; which++) {
            int64_t strips = (matrices[which]->rows / PANEL + STRIP - 1) / STRIP;
            int64_t pieces = strips * ((rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
            if (piece < pieces) break;
            piece -= pieces;
        }
        if (which == count) break;
        const Matrix *matrix = matrices[which];
        int64_t panels = matrix->rows / PANEL, strips = (panels + STRIP - 1) / STRIP;
        int64_t panel = piece % strips * STRIP, row = piece / strips * ROWS_AT_ONCE;
        int64_t stop = panel + STRIP < panels ? panel + STRIP : panels;
        int64_t some = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
        if (matrix->bits == 8) strip(matrix, inputs, outputs[which], panel, stop, row, some, 1, added);
        else strip(matrix, inputs, outputs[which], panel, stop, row, some, 0, added);
    }
    meet(team);
}
