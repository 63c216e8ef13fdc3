/* The work on tiles and rows in vectors of LANES floats and blocks of ROWS rows.
 *
 * cpu_triangle.c includes this file once for each kind of processor, so that every function is
 * compiled for it from the start: inlining a function of vectors into one for another processor would
 * not widen them. NAME() appends the kind to a name.
 */
#define lanes NAME(lanes)
#define integers NAME(integers)
#define COLUMNS (2 * LANES)

typedef VECTOR(float) lanes;
typedef VECTOR(int32_t) integers;

INLINE float NAME(total)(const lanes *x)
{
    float sums[LANES];
    *(lanes *)sums = *x;
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return sums[0];
}

/* *x = 2^(*x - excess * *x) for |*x| <= 125 and a tiny excess; NaN stays NaN. */
INLINE void NAME(power_of_two)(lanes *x, float excess)
{
    /* Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. */
    const float shift = 12582912.0f;
    const int32_t bias = 127, mantissa_bits = 23;
    union { lanes real; integers bits; } shifted = {.real = *x + shift}, power;
    lanes r = *x - (shifted.real - shift) - *x * excess;
    /* On [-1/2, 1/2] within 2e-9 of 2^r, which it meets at 0. */
    lanes y = r * 1.535336196e-04f + 1.339887385e-03f;
    y = y * r + 9.618436918e-03f;
    y = y * r + 5.550332367e-02f;
    y = y * r + 2.402264774e-01f;
    y = y * r + 6.931471825e-01f;
    y = y * r + 1.0f;
    power.bits = (shifted.bits << mantissa_bits) + (bias << mantissa_bits);
    *x = y * power.real;
}

/* out [ROWS][COLUMNS], a row every `out_step`, is or gets added the product of a [ROWS][depth] and
 * b [depth][COLUMNS]. Meanwhile what is `ahead` is fetched to the cache, two floats of different
 * arrays for each product, since a core waits for memory if that begins when a tile is needed. Steps
 * of a, b and out are constants of the callers. */
INLINE void NAME(multiply)(const float *a, int64_t row_step, int64_t depth_step, const float *b,
                           int64_t b_step, int64_t depth, float *out, int64_t out_step, int adds,
                           struct ahead *ahead)
{
    const float *first = ahead->first, *second = ahead->second;
    lanes sums[ROWS][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++, a += depth_step, b += b_step) {
        lanes left = *(const lanes *)b, right = *(const lanes *)(b + LANES);
        __builtin_prefetch(first, 0, 2);
        __builtin_prefetch(second, 0, 2);
        first += ahead->first_step;
        second += ahead->second_step;
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            float x = a[row * row_step];
            sums[row][0] += x * left;
            sums[row][1] += x * right;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            lanes *sum = (lanes *)(out + row * out_step + side * LANES);
            if (adds)
                sums[row][side] += *sum;
            *sum = sums[row][side];
        }
    ahead->first = first;
    ahead->second = second;
}

/* Options and results of the last step of a tile, which turns products s into 2^s or weights. */
struct NAME(ending) {
    /* Where the exponentials are wanted: their sums of rows [TILE][LANES] and of columns [TILE].
     * Where the weights in the gradient are wanted: u of both sides, else null. */
    lanes *row_sums, *row_products;
    float *column_sums, *column_products;
    const float *row_u, *column_u;
    /* Factors of s of both sides, where they are not 1. */
    const float *row_scales, *column_scales;
    /* Masks of both sides: a pair counts where both rows exist and their keys differ. */
    const float *row_exists, *column_exists;
    const int32_t *row_keys, *column_keys;
    float excess;
};

/* What a tile is computed for; constants, so that each combination is compiled by itself. */
enum NAME(kind) { NAME(MASKED) = 1, NAME(WEIGHS) = 2, NAME(BY_ROW) = 4, NAME(PRODUCTS) = 8 };

/* Set the exponentials of pairs that D leaves out to 0: of row i and columns from j on. */
INLINE void NAME(mask)(const struct NAME(ending) *end, int i, int j, lanes *e)
{
    *e *= *(const lanes *)(end->column_exists + j) * end->row_exists[i];
    union { lanes real; integers bits; } kept = {.real = *e};
    kept.bits &= *(const integers *)(end->column_keys + j) != end->row_keys[i];
    *e = kept.real;
}

/* Turn the products of ROWS rows and COLUMNS columns of a tile into 2^s, or into weights. */
INLINE void NAME(finish_pairs)(const struct NAME(ending) *end, float *tile, int row, int column,
                               int kind)
{
    float *out = tile + row * TILE + column;
    lanes of_columns[2] = {{0}}, products_of_columns[2] = {{0}};
    for (int i = row; i < row + ROWS; i++, out += TILE) {
        lanes of_row = {0}, products_of_row = {0};
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            int j = column + side * LANES;
            lanes s = *(lanes *)(out + side * LANES), e = s, e_column;
            if (kind & NAME(BY_ROW)) {
                e *= end->row_scales[i];
                e_column = s * *(const lanes *)(end->column_scales + j);
                NAME(power_of_two)(&e_column, end->excess);
                if (kind & NAME(MASKED))
                    NAME(mask)(end, i, j, &e_column);
            }
            NAME(power_of_two)(&e, end->excess);
            if (kind & NAME(MASKED))
                NAME(mask)(end, i, j, &e);
            if (!(kind & NAME(BY_ROW)))
                e_column = e;
            if (kind & NAME(WEIGHS) && kind & NAME(BY_ROW))
                e = e_column * *(const lanes *)(end->column_u + j) + e * end->row_u[i];
            else if (kind & NAME(WEIGHS))
                e *= *(const lanes *)(end->column_u + j) + end->row_u[i];
            else {
                of_row += e;
                of_columns[side] += e_column;
                if (kind & NAME(PRODUCTS)) {
                    products_of_row += e * s;
                    products_of_columns[side] += e_column * s;
                }
            }
            *(lanes *)(out + side * LANES) = e;
        }
        if (!(kind & NAME(WEIGHS)))
            end->row_sums[i] += of_row;
        if (kind & NAME(PRODUCTS))
            end->row_products[i] += products_of_row;
    }
#pragma GCC unroll 2
    for (int side = 0; side < 2; side++) {
        int j = column + side * LANES;
        if (!(kind & NAME(WEIGHS)))
            *(lanes *)(end->column_sums + j) += of_columns[side];
        if (kind & NAME(PRODUCTS))
            *(lanes *)(end->column_products + j) += products_of_columns[side];
    }
}

/* Rows of block i that nobody needs are left as they are. */
INLINE void NAME(fill_tile)(const struct plan *q, int64_t i, int64_t j, float *tile,
                            const struct NAME(ending) *end, int kind)
{
    const int64_t num_rows = smaller(TILE, q->num_needed - i * TILE);
    const float *a = q->transposed + i * q->width * TILE, *b = q->transposed + j * q->width * TILE;
    /* For each k the tile has TILE * TILE / (ROWS * COLUMNS) steps, which fetch TILE floats. */
    const float *next = j + 1 < q->blocks ? b + q->width * TILE : a;
    struct ahead ahead = {next, larger(ROWS * COLUMNS / TILE, 1), next, 0};
    for (int64_t start = 0; start < q->width; start += DEPTH) {
        int64_t depth = smaller(DEPTH, q->width - start);
        for (int column = 0; column < TILE; column += COLUMNS)
            for (int row = 0; row < num_rows; row += ROWS) {
                NAME(multiply)(a + start * TILE + row, 1, TILE, b + start * TILE + column, TILE,
                               depth, tile + row * TILE + column, TILE, start > 0, &ahead);
                if (start + depth == q->width)
                    NAME(finish_pairs)(end, tile, row, column, kind);
            }
    }
}

/* Compute the exponentials, or with u the weights in the gradient, of blocks i and j of rows. Add the
 * sums of rows and columns of exponentials to those of `sums`, null where not wanted. */
static void NAME(compute_tile)(const struct plan *q, int64_t i, int64_t j, float *tile,
                               const float *u, float *of_rows, float *of_columns)
{
    lanes row_sums[2][TILE];
    float column_sums[2][TILE] __attribute__((aligned(64)));
    struct NAME(ending) end = {
        row_sums[0], row_sums[1], column_sums[0], column_sums[1],
        u ? u + i * TILE : 0, u ? u + j * TILE : 0,
        q->scales ? q->scales + i * TILE : 0, q->scales ? q->scales + j * TILE : 0,
        q->rows.exists + i * TILE, q->rows.exists + j * TILE,
        q->numbers + i * TILE, q->nothing, q->excess,
    };
    memset(row_sums, 0, sizeof row_sums[0] * (1 + q->sums_products));
    memset(column_sums, 0, sizeof column_sums[0] * (1 + q->sums_products));
    int kind = q->incomplete[i] || q->incomplete[j] ? NAME(MASKED) : 0;
    if (q->denominator == NEGATIVES) {
        end.row_keys = q->rows.classes + i * TILE;
        end.column_keys = q->rows.classes + j * TILE;
        kind = NAME(MASKED);
    } else if (q->denominator == OTHERS && i == j) {
        end.column_keys = end.row_keys;
        kind = NAME(MASKED);
    }
    kind |= (u ? NAME(WEIGHS) : 0) | (q->scales ? NAME(BY_ROW) : 0);
    if (q->sums_products && !u)
        kind |= NAME(PRODUCTS);
    switch (kind) {
#define KIND(KIND)                                                                                  \
    case KIND:                                                                                      \
        NAME(fill_tile)(q, i, j, tile, &end, KIND);                                                 \
        break;
    KIND(0) KIND(1) KIND(2) KIND(3) KIND(4) KIND(5) KIND(6) KIND(7) KIND(8) KIND(9) KIND(12) KIND(13)
#undef KIND
    }
    if (u)
        return;
    for (int sum = 0; sum <= q->sums_products; sum++) {
        for (int row = 0; row < TILE; row++)
            of_rows[sum * q->slots_size + row] += NAME(total)(&row_sums[sum][row]);
        if (of_columns)
            for (int column = 0; column < TILE; column++)
                of_columns[sum * q->slots_size + column] += column_sums[sum][column];
    }
}

/* Add to G of `count` rows from `first` of a block what a tile of another block contributes.
 *
 * The tile holds weights or, with u of both sides, exponentials; rows are its columns if it is
 * `transposed`. scratch: [TILE][TILE]. next: the tile that comes next. */
INLINE void NAME(contribute_from)(const struct plan *q, const float *tile, int transposed,
                                  int64_t first, int64_t count, const float *u,
                                  const float *other_u, int64_t other, float *products,
                                  float *scratch, const float *next)
{
    const int64_t row_step = transposed ? 1 : TILE, depth_step = transposed ? TILE : 1;
    tile += first * row_step;
    if (u && transposed) {
        for (int64_t k = 0; k < TILE; k++)
            for (int64_t row = 0; row < count; row += LANES)
                *(lanes *)(scratch + k * TILE + row) = *(const lanes *)(tile + k * TILE + row) *
                                                       (*(const lanes *)(u + row) + other_u[k]);
        tile = scratch;
    } else if (u) {
        for (int64_t row = 0; row < count; row++)
#pragma GCC unroll 12
            for (int64_t k = 0; k < TILE; k += LANES)
                *(lanes *)(scratch + row * TILE + k) =
                    *(const lanes *)(tile + row * TILE + k) *
                    (*(const lanes *)(other_u + k) + u[row]);
        tile = scratch;
    }
    const float *panel = q->panels + other * TILE * PANEL, *end = next + TILE * TILE;
    const int64_t num_steps = q->num_panels * (PANEL / COLUMNS) * (count / ROWS) * TILE;
    struct ahead ahead = {next, TILE * TILE / num_steps + 1, panel, 4 * TILE / count};
    for (int64_t c = 0; c < q->num_panels; c++, panel += q->padded * PANEL) {
        ahead.second = c + 1 < q->num_panels ? panel + q->padded * PANEL : panel;
        for (int column = 0; column < PANEL; column += COLUMNS)
            for (int64_t row = 0; row < count; row += ROWS) {
                if (ahead.first >= end)
                    ahead.first_step = 0;
                NAME(multiply)(tile + row * row_step, row_step, depth_step, panel + column, PANEL,
                               TILE, products + (c * TILE + row) * PANEL + column, PANEL, 1, &ahead);
            }
    }
}

static void NAME(contribute)(const struct plan *q, const float *tile, int transposed, int64_t first,
                             int64_t count, const float *u, const float *other_u, int64_t other,
                             float *products, float *scratch, const float *next)
{
    if (transposed)
        NAME(contribute_from)(q, tile, 1, first, count, u, other_u, other, products, scratch, next);
    else
        NAME(contribute_from)(q, tile, 0, first, count, u, other_u, other, products, scratch, next);
}

/* x . y of two rows in panels, one every x_step and y_step. */
INLINE float NAME(dot)(const float *x, int64_t x_step, const float *y, int64_t y_step,
                       int64_t num_panels)
{
    lanes sum = {0}, other = {0};
    for (int64_t c = 0; c < num_panels; c++, x += x_step, y += y_step)
#pragma GCC unroll 8
        for (int k = 0; k < PANEL; k += COLUMNS) {
            sum += *(const lanes *)(x + k) * *(const lanes *)(y + k);
            other += *(const lanes *)(x + k + LANES) * *(const lanes *)(y + k + LANES);
        }
    sum += other;
    return NAME(total)(&sum);
}

/* Compute the y of the rows of a block, in both layouts. row: [PANEL * num_panels]. */
static void NAME(pack_block)(const struct plan *q, int64_t exit, int64_t block, float *row)
{
    int64_t step = q->padded * PANEL;
    memset(row, 0, sizeof(float) * PANEL * q->num_panels);
    for (int64_t i = block * TILE; i < (block + 1) * TILE; i++) {
        float *y = q->panels + i * PANEL, factor = 0;
        if (q->rows.exists[i] > 0) {
            load(q, exit, i, row);
            float norm = q->p ? sqrtf(NAME(dot)(row, PANEL, row, PANEL, q->num_panels)) : 1;
            factor = norm <= ZERO_NORM ? 0 : q->scale / norm;
        }
        q->inverse_norm[i] = factor;
        for (int64_t c = 0; c < q->num_panels; c++)
            for (int k = 0; k < PANEL; k += LANES)
                if (q->rows.exists[i] > 0)
                    *(lanes *)(y + c * step + k) = *(const lanes *)(row + c * PANEL + k) * factor;
                else
                    *(lanes *)(y + c * step + k) = (lanes){0};
    }
    if (q->all_are_kept)
        return;
    float *transposed = q->transposed + block * q->width * TILE;
    for (int64_t k = 0; k < q->width; k++) {
        const float *y = q->panels + k / PANEL * step + block * TILE * PANEL + k % PANEL;
        for (int64_t i = 0; i < TILE; i++)
            transposed[k * TILE + i] = y[i * PANEL];
    }
}

/* Sum the columns of one panel over every class. */
static void NAME(sum_classes)(const struct plan *q, int64_t panel)
{
    const int64_t size = q->rows.num_classes * PANEL;
    float *sums = q->class_sums + panel * q->num_classes * PANEL;
    float *means = q->mean_sums + panel * q->num_classes * PANEL;
    memset(sums, 0, sizeof(float) * size);
    for (int64_t i = 0; i < q->num_rows; i++) {
        if (i == q->num_needed)
            memcpy(means, sums, sizeof(float) * size);
        const float *y = q->panels + (panel * q->padded + i) * PANEL;
        if (q->rows.classes[i] >= 0)
            for (int k = 0; k < PANEL; k += LANES)
                *(lanes *)(sums + q->rows.classes[i] * PANEL + k) += *(const lanes *)(y + k);
    }
    if (means != sums)
        for (int64_t k = 0; k < size; k++)
            means[k] = 0.5f * (means[k] + sums[k]);
}

/* Return the sum of s over the positives of row i. */
static float NAME(sum_positives)(const struct plan *q, int64_t i)
{
    int64_t step = q->padded * PANEL;
    const float *y = q->panels + i * PANEL, *sum = q->class_sums + q->rows.classes[i] * PANEL;
    return NAME(dot)(sum, q->num_classes * PANEL, y, step, q->num_panels) -
           NAME(dot)(y, step, y, step, q->num_panels);
}

/* Write the gradient of row i, and y . G where wanted, from its G, which is changed. */
static void NAME(finish_row)(const struct plan *q, int64_t exit, int64_t i, float *products)
{
    int64_t step = q->padded * PANEL, width = q->width;
    const float *y = q->panels + i * PANEL;
    float *gradient = q->p ? q->p->gradient + (exit * q->num_trained + i) * width
                           : q->pairs_p->result + i * width;
    float *both = q->p && q->p->products ? q->p->products + exit * q->num_trained + i : 0;
    if (!q->p) {
        for (int64_t k = 0; k < width; k++)
            gradient[k] = products[k / PANEL * TILE * PANEL + k % PANEL] * q->unscale;
        return;
    }
    if (q->rows.classes[i] < 0) {
        memset(gradient, 0, sizeof(float) * width);
        if (both)
            *both = 0;
        return;
    }
    const float *sum = q->mean_sums + q->rows.classes[i] * PANEL;
    /* All anchors of a class have the same v, so A is v times their sum. */
    float twice_v = 2 * q->rows.weight[i] * q->rows.inverse_positives[i];
    for (int64_t c = 0; c < q->num_panels; c++)
        for (int k = 0; k < PANEL; k += LANES)
            *(lanes *)(products + c * TILE * PANEL + k) -=
                twice_v * (*(const lanes *)(sum + c * q->num_classes * PANEL + k) -
                           *(const lanes *)(y + c * step + k));
    float dot = NAME(dot)(products, TILE * PANEL, y, step, q->num_panels);
    float projection = dot * q->unscale * q->unscale;
    float factor = q->inverse_norm[i] * q->gradient_scale;
    if (both)
        *both = dot * q->gradient_scale;
    for (int64_t c = 0; c < q->num_panels; c++)
        for (int64_t k = 0; k < smaller(PANEL, width - c * PANEL); k++)
            gradient[c * PANEL + k] =
                (products[c * TILE * PANEL + k] - y[c * step + k] * projection) * factor;
}

static const struct functions NAME(functions) = {
    NAME(compute_tile), NAME(contribute), NAME(pack_block), NAME(sum_classes), NAME(sum_positives),
    NAME(finish_row),
};

#undef lanes
#undef integers
#undef COLUMNS
#undef LANES
#undef ROWS
#undef NAME
