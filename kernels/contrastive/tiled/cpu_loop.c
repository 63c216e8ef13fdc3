/* The contrastive loss of a small batch and its gradient in one call: at 32 samples the overhead of
 * PyTorch's forty operations exceeds their computation many times.
 *
 * Formulas and names are those of loss.py. Plain C without Python's headers, called through ctypes
 * (cpu_loop.py).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_rows.h"

/* A checksum of the files that this was built from; setup.py defines it, c_loops.py compares it. */
#ifndef SOURCES
#define SOURCES 0
#endif
const uint32_t fusedacl_sources = SOURCES;

/* Block of a product: twelve sums, two loads and a broadcast use fifteen of sixteen registers. */
#define ROWS 6
#define LANES 8
#define COLUMNS (2 * LANES)
/* Products summed before their sum is added to the result: rounding grows with their number. */
#define SUMMANDS 128

typedef VECTOR(float) lanes;
typedef VECTOR(int32_t) integers;

enum step { NORMALIZE, PAIRS, GRADIENT };

/* Scratch memory of one exit. Threads that share its rows, in blocks of ROWS, write to different
 * memory in every step except NORMALIZE, which one thread does. */
struct scratch {
    float *y;        /* [columns][width], zeros beyond M and d */
    float *panels;   /* [columns / COLUMNS][d][COLUMNS]: y in blocks of sixteen transposed rows */
    float *products; /* [rows][width]: G, in the memory of the panels */
    float *pairs;    /* [rows][columns]: e, then the pairs' weights in the gradient */
    float *sums;     /* [classes][width] of y */
    float *inverse_norm, *u, *losses; /* [columns] */
    struct rows of;
    int64_t rows, columns, width; /* M, M and d, rounded up to whole blocks */
};

/* Place the arrays in memory from `start`; return their number of floats. */
static int64_t lay_out(const struct problem *p, float *start, struct scratch *s)
{
    int64_t used = 0;
    s->rows = rounded_up(num_rows(p), ROWS);
    s->columns = rounded_up(s->rows, COLUMNS);
    s->width = rounded_up(p->width, COLUMNS);
    s->of.padded = s->columns;
    s->of.table_size = label_table_size(p);
#define TAKE(NAME, COUNT) (s->NAME = (void *)(start + used), used += (COUNT))
    TAKE(y, s->columns * s->width);
    TAKE(panels, s->columns * s->width);
    s->products = s->panels;
    TAKE(pairs, s->rows * s->columns);
    TAKE(sums, s->columns * s->width);
    TAKE(inverse_norm, s->columns);
    TAKE(of.exists, s->columns);
    TAKE(of.inverse_positives, s->columns);
    TAKE(of.weight, s->columns);
    TAKE(u, s->columns);
    TAKE(losses, s->columns);
    TAKE(of.classes, s->columns);
    TAKE(of.members, s->columns);
    TAKE(of.table, s->of.table_size);
#undef TAKE
    return used;
}

/* exp for |x| <= 87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; NaN stays NaN. */
INLINE void exponentiate(lanes *e)
{
    /* Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. */
    const float shift = 12582912.0f;
    const int32_t shift_bits = 0x4B400000, bias = 127, mantissa_bits = 23;
    union { lanes real; integers bits; } shifted = {.real = *e * 1.44269504f + shift}, power;
    lanes n = shifted.real - shift;
    /* ln 2 in two parts; n times the first one is exact. */
    lanes r = *e - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    lanes tail = r * 1.9875691500e-4f + 1.3981999507e-3f;
    tail = tail * r + 8.3334519073e-3f;
    tail = tail * r + 4.1665795894e-2f;
    tail = tail * r + 1.6666665459e-1f;
    tail = tail * r + 5.0000001201e-1f;
    power.bits = (shifted.bits - shift_bits + bias) << mantissa_bits;
    *e = (tail * (r * r) + r + 1.0f) * power.real;
}

INLINE float total(const lanes *sums)
{
    lanes x = *sums;
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

INLINE float dot(const float *x, const float *y, int64_t width)
{
    lanes sum = {0}, other = {0};
    for (int64_t k = 0; k < width; k += COLUMNS) {
        sum += *(const lanes *)(x + k) * *(const lanes *)(y + k);
        other += *(const lanes *)(x + k + LANES) * *(const lanes *)(y + k + LANES);
    }
    sum += other;
    return total(&sum);
}

/* out [ROWS][COLUMNS] = a [ROWS][depth] b [depth][COLUMNS]. */
INLINE void block_product(const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                          int64_t depth, float *out, int64_t out_stride)
{
    for (int64_t start = 0; start == 0 || start < depth; start += SUMMANDS) {
        int64_t stop = smaller(start + SUMMANDS, depth);
        lanes sums[ROWS][2] = {{{0}}};
        for (int64_t k = start; k < stop; k++, b += b_stride) {
            lanes left = *(const lanes *)b, right = *(const lanes *)(b + LANES);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                float x = a[row * a_stride + k];
                sums[row][0] += x * left;
                sums[row][1] += x * right;
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++) {
                lanes *sum = (lanes *)(out + row * out_stride + side * LANES);
                if (start > 0)
                    sums[row][side] += *sum;
                *sum = sums[row][side];
            }
    }
}

/* Compute y, its panels, and the sum over each class. */
INLINE void normalize(const struct problem *p, struct scratch *s, int64_t exit)
{
    int64_t sizes[4] = {p->num_samples, p->num_labels, p->num_samples, p->num_labels}, i = 0;
    float root = (float)sqrt(p->temperature);
    memset(s->y, 0, sizeof(float) * s->columns * s->width);
    memset(s->sums, 0, sizeof(float) * s->columns * s->width);
    for (int part = 0; part < 2 * p->num_copies; part++) {
        /* Teachers are shared by the exits. */
        int64_t start = part < 2 ? exit * sizes[part] * p->width : 0;
        for (int64_t row = 0; row < sizes[part]; row++, i++, start += p->width) {
            float *y = s->y + i * s->width;
            s->inverse_norm[i] = 0;
            if (s->of.classes[i] < 0)
                continue;
            load_row(p, part, start, y, p->width);
            float norm = sqrtf(dot(y, y, s->width));
            s->inverse_norm[i] = norm <= ZERO_NORM ? 0 : 1 / (norm * root);
            float *sum = s->sums + s->of.classes[i] * s->width;
            for (int64_t k = 0; k < s->width; k += LANES) {
                *(lanes *)(y + k) *= s->inverse_norm[i];
                *(lanes *)(sum + k) += *(lanes *)(y + k);
            }
        }
    }
    for (int64_t first = 0; first < s->columns; first += COLUMNS)
        for (int64_t k = 0; k < p->width; k++)
            for (int64_t column = 0; column < COLUMNS; column++)
                s->panels[first * p->width + k * COLUMNS + column] =
                    s->y[(first + column) * s->width + k];
}

/* Compute e of the ROWS rows from `first` with all columns, and the rows' u and losses. */
INLINE void pair_up(const struct problem *p, struct scratch *s, int64_t first)
{
    lanes sums[ROWS] = {{0}};
    for (int64_t column = 0; column < s->columns; column += COLUMNS) {
        float *pairs = s->pairs + first * s->columns + column;
        block_product(s->y + first * s->width, s->width, s->panels + column * p->width, COLUMNS,
                      p->width, pairs, s->columns);
        for (int row = 0; row < ROWS; row++, pairs += s->columns) {
            for (int side = 0; side < COLUMNS; side += LANES) {
                lanes *e = (lanes *)(pairs + side);
                exponentiate(e);
                *e *= *(lanes *)(s->of.exists + column + side);
                if (p->denominator == NEGATIVES)
                    *(integers *)e &=
                        *(integers *)(s->of.classes + column + side) != s->of.classes[first + row];
            }
            int64_t diagonal = first + row - column;
            if (p->denominator == OTHERS && diagonal >= 0 && diagonal < COLUMNS)
                pairs[diagonal] = 0;
            sums[row] += *(lanes *)pairs + *(lanes *)(pairs + LANES);
        }
    }
    for (int64_t i = first; i < first + ROWS; i++) {
        const float *y = s->y + i * s->width;
        float sum = total(&sums[i - first]), positives = 0;
        /* A row with nothing to compare has D = 0 and does not count: 0 * log D is 0. */
        sum = sum < SMALLEST ? SMALLEST : sum;
        s->u[i] = s->of.weight[i] / sum;
        if (s->of.classes[i] >= 0)
            positives = dot(s->sums + s->of.classes[i] * s->width, y, s->width) - dot(y, y, s->width);
        s->losses[i] = s->of.weight[i] * (logf(sum) - positives * s->of.inverse_positives[i]);
    }
}

INLINE float sum_losses(const struct problem *p, const struct scratch *s)
{
    double loss = 0;
    for (int64_t i = 0; i < num_rows(p); i++)
        loss += s->losses[i];
    return (float)loss;
}

/* Compute the gradient of the trained rows among the ROWS rows from `first`. */
INLINE void differentiate(const struct problem *p, struct scratch *s, int64_t exit, int64_t first)
{
    float *pairs = s->pairs + first * s->columns, *product = s->products + first * s->width;
    for (int row = 0; row < ROWS; row++)
        for (int64_t column = 0; column < s->columns; column += LANES)
            *(lanes *)(pairs + row * s->columns + column) *=
                *(lanes *)(s->u + column) + s->u[first + row];
    for (int64_t k = 0; k < s->width; k += COLUMNS)
        block_product(pairs, s->columns, s->y + k, s->width, num_rows(p), product + k, s->width);
    for (int64_t i = first; i < first + ROWS && i < num_trained(p); i++, product += s->width) {
        float *gradient = p->gradient + (exit * num_trained(p) + i) * p->width;
        if (s->of.classes[i] < 0) {
            memset(gradient, 0, sizeof(float) * p->width);
            if (p->products)
                p->products[exit * num_trained(p) + i] = 0;
            continue;
        }
        const float *y = s->y + i * s->width, *sum = s->sums + s->of.classes[i] * s->width;
        /* All rows of a class have the same v, so both class terms are equal. */
        float twice_v = 2 * s->of.weight[i] * s->of.inverse_positives[i];
        for (int64_t k = 0; k < s->width; k += LANES)
            *(lanes *)(product + k) -=
                twice_v * (*(const lanes *)(sum + k) - *(const lanes *)(y + k));
        float both = dot(product, y, s->width), projection = (float)p->temperature * both;
        if (p->products)
            p->products[exit * num_trained(p) + i] = both;
        for (int64_t k = 0; k < s->width; k += LANES)
            *(lanes *)(product + k) =
                (*(lanes *)(product + k) - *(const lanes *)(y + k) * projection) *
                s->inverse_norm[i];
        memcpy(gradient, product, sizeof(float) * p->width);
    }
}

INLINE void step_through(const struct problem *p, struct scratch *s, enum step step, int64_t exit,
                      int64_t first, int64_t last)
{
    if (step == NORMALIZE)
        normalize(p, s, exit);
    if (step == GRADIENT && first == 0)
        p->losses[exit] = sum_losses(p, s);
    for (int64_t row = first * ROWS; row < last * ROWS; row += ROWS) {
        if (step == PAIRS)
            pair_up(p, s, row);
        else if (step == GRADIENT && p->gradient && row < num_trained(p))
            differentiate(p, s, exit, row);
    }
}

/* The same code compiled for every machine and for machines with fused multiply-add, which doubles the
 * speed. target_clones cannot do it: "avx2,fma" makes two clones, one without the other. Tests
 * define ANY_MACHINE. */
static void step_anywhere(const struct problem *p, struct scratch *s, enum step step,
                               int64_t exit, int64_t first, int64_t last)
{
    step_through(p, s, step, exit, first, last);
}

#if defined(__x86_64__) && !defined(ANY_MACHINE)
__attribute__((target("avx2,fma")))
static void step_with_fma(const struct problem *p, struct scratch *s, enum step step,
                          int64_t exit, int64_t first, int64_t last)
{
    step_through(p, s, step, exit, first, last);
}

static int has_fma(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define step_with_fma step_anywhere
#define has_fma() 0
#endif

/* Do one step of an exit for the blocks of rows first <= block < last. */
static void take_step(const struct problem *p, float *scratch, int step, int64_t exit,
                      int64_t first, int64_t last)
{
    struct scratch s;
    lay_out(p, scratch, &s);
    (has_fma() ? step_with_fma : step_anywhere)(p, &s, (enum step)step, exit, first, last);
}

/* Return the number of floats of scratch memory of an exit. */
int64_t supcon_scratch(const struct problem *p)
{
    struct scratch s;
    return lay_out(p, 0, &s);
}

/* Compute losses and gradients of all exits. Every row is computed by one thread, so that the bits do
 * not depend on the number of threads. `scratch` has memory for min(num_threads, num_exits) exits.
 * Return the position of a label outside [0, K), or -1. */
int64_t supcon_loss(const struct problem *p, float *scratch, int64_t num_threads)
{
    struct scratch s;
    int64_t size = lay_out(p, scratch, &s), num_blocks = s.rows / ROWS;
    if (num_rows(p) == 0) {
        memset(p->losses, 0, sizeof(float) * p->num_exits);
        return -1;
    }
    int64_t num_teams = smaller(num_threads, p->num_exits);
    for (int64_t team = 0; team < num_teams; team++) {
        lay_out(p, scratch + team * size, &s);
        int64_t outside = find_classes(p, &s.of);
        if (outside >= 0)
            return outside;
        weigh_rows(p, &s.of);
    }
    if (p->num_exits >= num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
        for (int64_t team = 0; team < num_teams; team++)
            for (int64_t exit = team; exit < p->num_exits; exit += num_teams)
                for (int step = NORMALIZE; step <= GRADIENT; step++)
                    take_step(p, scratch + team * size, step, exit, 0, num_blocks);
        return -1;
    }
    for (int64_t exit = 0; exit < p->num_exits; exit++) {
        take_step(p, scratch, NORMALIZE, exit, 0, num_blocks);
        for (int step = PAIRS; step <= GRADIENT; step++)
#pragma omp parallel for schedule(static) num_threads(num_threads)
            for (int64_t share = 0; share < num_threads; share++)
                take_step(p, scratch, step, exit, num_blocks * share / num_threads,
                          num_blocks * (share + 1) / num_threads);
    }
    return -1;
}
