/* Inputs in bytes times packed codes, for any number of rows of inputs.

   A panel holds 16 rows of a matrix; a register holds 4 columns of each of them, so a sum of products needs no sum over
   lanes, and one scale of inputs and 16 of weights turn it into floats after every 32 columns. */

/* Bytes and scales of rows [from, to) of `values` [rows][columns]: round(value / scale), scale = largest / 127. */
static void quantize_row(const float *values, int64_t columns, int8_t *codes, float *scales, int32_t *sums)
{
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        const float *own = values + block * BLOCK;
        floats most = {0};
        for (int i = 0; i < BLOCK; i += LANES) most = larger(most, larger(read_floats(own + i), -read_floats(own + i)));
        float largest = largest_lane(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        ints sum = {0};
        for (int i = 0; i < BLOCK; i += LANES) {
            ints code = __builtin_convertvector(nearest(read_floats(own + i) * inverse), ints);
            *(few_bytes_at *)(codes + block * BLOCK + i) = __builtin_convertvector(code, few_bytes);
            sum += code;
        }
        scales[block] = largest / 127.0f;
        sums[block] = 0;
        for (int lane = 0; lane < LANES; lane++) sums[block] += sum[lane];
    }
}

/* Outputs of `panels` panels for `rows` rows of inputs; both are constants where this is inlined. */
INLINE void tile(const Matrix *matrix, const Inputs *inputs, int64_t panel, int64_t row, const int panels,
                 const int rows, const int wide, floats totals[panels * PARTS][rows])
{
    const int64_t blocks = matrix->columns / BLOCK, per_group = matrix->group_size / BLOCK;
    const int64_t groups = blocks / per_group, block_bytes = PANEL * BLOCK / (wide ? 1 : 2);
    const int zero = wide ? WIDE_ZERO : 8, parts = panels * PARTS;
    for (int p = 0; p < parts; p++)
        for (int r = 0; r < rows; r++) totals[p][r] = (floats){0};
    for (int64_t group = 0; group < groups; group++) {
        floats weight_scales[parts];
        for (int p = 0; p < parts; p++)
            weight_scales[p] = read_halves(matrix->scales + ((panel + p / PARTS) * groups + group) * PANEL + p % PARTS * LANES);
        for (int64_t block = group * per_group; block < (group + 1) * per_group; block++) {
            ints sums[parts][rows];
            const int8_t *own[rows];
            for (int r = 0; r < rows; r++) {
                own[r] = inputs->codes + (row + r) * matrix->columns + block * BLOCK;
                for (int p = 0; p < parts; p++) sums[p][r] = all_ints(-zero * inputs->sums[(row + r) * blocks + block]);
            }
            for (int quad = 0; quad < (wide ? 8 : 4); quad++)
                for (int p = 0; p < parts; p++) {
                    int64_t place = ((panel + p / PARTS) * blocks + block) * block_bytes;
                    bytes codes = read_bytes(matrix->codes + place + 64 * quad + p % PARTS * LANES * 4);
                    for (int r = 0; wide && r < rows; r++) sums[p][r] = dot_wide_bytes(sums[p][r], codes, four_bytes(own[r] + 4 * quad));
                    if (wide) continue;
                    bytes low = codes & 15, high = (bytes)(((ints)codes >> 4) & 0x0f0f0f0f);
                    for (int r = 0; r < rows; r++) {
                        sums[p][r] = dot_bytes(sums[p][r], low, four_bytes(own[r] + 4 * quad));
                        sums[p][r] = dot_bytes(sums[p][r], high, four_bytes(own[r] + 16 + 4 * quad));
                    }
                }
            for (int r = 0; r < rows; r++) {
                floats scale = all_floats(inputs->scales[(row + r) * blocks + block]);
                for (int p = 0; p < parts; p++) totals[p][r] += to_floats(sums[p][r]) * scale * weight_scales[p];
            }
        }
    }
}

INLINE void store_tile(const Matrix *matrix, const Inputs *inputs, float *outputs, int64_t panel, int64_t row,
                       const int panels, const int rows, const int wide, int added)
{
    floats totals[panels * PARTS][rows];
    tile(matrix, inputs, panel, row, panels, rows, wide, totals);
    for (int p = 0; p < panels * PARTS; p++)
        for (int r = 0; r < rows; r++) {
            int64_t column = panel * PANEL + p * LANES;
            float *place = outputs + (row + r) * matrix->rows + column;
            if (matrix->bias) totals[p][r] += read_floats(matrix->bias + column);
            if (added) totals[p][r] += read_floats(place);
            write_floats(place, totals[p][r]);
        }
}

/* A strip of panels for some rows, in tiles as large as the registers allow. */
INLINE void strip(const Matrix *matrix, const Inputs *inputs, float *outputs, int64_t panel, int64_t stop,
                         int64_t row, const int rows, const int wide, int added)
{
    enum { FEW = TILE_PANELS, MANY = 2 * TILE_PANELS };
    if (rows == 1)
        for (; panel + MANY <= stop; panel += MANY)
            store_tile(matrix, inputs, outputs, panel, row, MANY, 1, wide, added);
    for (; panel + FEW <= stop; panel += FEW) store_tile(matrix, inputs, outputs, panel, row, FEW, rows, wide, added);
    for (; panel < stop; panel++) store_tile(matrix, inputs, outputs, panel, row, 1, rows, wide, added);
}

static void strip_of_rows(const Matrix *matrix, const Inputs *inputs, float *outputs, int64_t panel, int64_t stop,
                                 int64_t row, int64_t rows, const int wide, int added)
{
    /* Rows in the outer loop would read a strip again for each; it lies in the nearest cache after the first. */
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, row += TILE_ROWS)
        strip(matrix, inputs, outputs, panel, stop, row, TILE_ROWS, wide, added);
    if (rows >= 2) {
        strip(matrix, inputs, outputs, panel, stop, row, 2, wide, added);
        rows -= 2, row += 2;
    }
    for (; rows > 0; rows--, row++) strip(matrix, inputs, outputs, panel, stop, row, 1, wide, added);
}

/* A share of outputs = inputs @ matrix.T for several matrices with the same inputs; the team meets afterwards. */
static void multiply(Team *team, const Matrix *const *matrices, float *const *outputs, int count,
                            const Inputs *inputs, int64_t rows, int added)
{
    enum { STRIP = 8, ROWS_AT_ONCE = 96 };
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
        if (matrix->bits == 8) strip_of_rows(matrix, inputs, outputs[which], panel, stop, row, some, 1, added);
        else strip_of_rows(matrix, inputs, outputs[which], panel, stop, row, some, 0, added);
    }
    meet(team);
}
