/* The rows of a contrastive batch in the compiled loops: their values, classes and weights. */
#ifndef CPU_ROWS_H
#define CPU_ROWS_H

#include <stdint.h>
#include <string.h>

/* A vector this short has no direction (ZERO_NORM in batch.py). */
#define ZERO_NORM 1e-12f
#define SMALLEST 1.17549435e-38f

#define INLINE static inline __attribute__((always_inline))
/* Passed through pointers: by value would depend on the target's calling convention. */
#define VECTOR(TYPE) TYPE __attribute__((vector_size(4 * LANES), aligned(4), may_alias))

/* In the order of cpu_loop.py. */
enum denominator { ALL, OTHERS, NEGATIVES };
enum reduction { MEAN, SUM };
enum dtype { FLOAT32, FLOAT16, BFLOAT16 };

/* Classes of rows that do not exist: ignored by their label, or padding. */
enum { IGNORED = -1, PADDING = -2 };

/* Problem in cpu_loop.py has the same fields. */
struct problem {
    /* Samples [E][N][d], label embeddings [E][K][d], their teacher counterparts [N][d] and [K][d], and
     * the memory [Q][d], whose rows are no anchors (supcon_triangle alone takes one); null where
     * absent. */
    const void *parts[5];
    int64_t dtypes[5];
    const int64_t *labels; /* [N + Q] */
    float *losses;         /* [E] */
    float *gradient;       /* [E][N + K][d], or null */
    float *products;       /* [E][N + K] beside the gradient: y . G, or null */
    int64_t num_exits, num_samples, num_labels, num_copies; /* 2 copies with teachers, else 1 */
    int64_t num_memory, width, ignore_index, denominator, reduction;
    double temperature;
};

/* Data of all rows and padding that the exits share. */
struct rows {
    float *exists, *inverse_positives, *weight; /* [padded] */
    int32_t *classes, *members;                 /* [padded] */
    int32_t *table;                             /* [table_size]: finds equal labels */
    int64_t padded, table_size, num_classes; /* num_classes: those found */
};

INLINE int64_t rounded_up(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

INLINE int64_t smaller(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

INLINE int64_t larger(int64_t x, int64_t y)
{
    return x > y ? x : y;
}

INLINE int64_t num_trained(const struct problem *p)
{
    return p->num_samples + p->num_labels;
}

INLINE int64_t num_anchors(const struct problem *p)
{
    return num_trained(p) * p->num_copies;
}

INLINE int64_t num_rows(const struct problem *p)
{
    return num_anchors(p) + p->num_memory;
}

/* Row of the label at position i. */
INLINE int64_t row_of(const struct problem *p, int64_t i)
{
    return i < p->num_samples ? i : i - p->num_samples + num_anchors(p);
}

/* Twice the number of labels or more, a power of 2; none where label embeddings number classes. */
INLINE int64_t label_table_size(const struct problem *p)
{
    int64_t size = 16;
    while (p->num_labels == 0 && size < 2 * (p->num_samples + p->num_memory))
        size *= 2;
    return size;
}

/* Return the first position of the label at position i, which is in the table afterwards. */
INLINE int64_t first_with_label(const struct problem *p, struct rows *rows, int64_t i)
{
    int64_t label = p->labels[i], mask = rows->table_size - 1;
    uint64_t mixed = (uint64_t)label * 0x9E3779B97F4A7C15u;
    int64_t slot = (int64_t)(mixed >> 32) & mask;
    while (rows->table[slot] >= 0 && p->labels[rows->table[slot]] != label)
        slot = (slot + 1) & mask;
    if (rows->table[slot] < 0)
        rows->table[slot] = (int32_t)i;
    return rows->table[slot];
}

/* Find the class of each row (its label or, without label embeddings, the number of labels seen
 * before) and its size. Return the position of a label outside [0, K), or -1. */
static int64_t find_classes(const struct problem *p, struct rows *rows)
{
    int32_t num_classes = (int32_t)p->num_labels;
    memset(rows->members, 0, sizeof(int32_t) * rows->padded);
    memset(rows->table, -1, sizeof(int32_t) * rows->table_size);
    for (int64_t i = 0; i < p->num_samples + p->num_memory; i++) {
        int64_t label = p->labels[i], row = row_of(p, i);
        if (label == p->ignore_index) {
            rows->classes[row] = IGNORED;
        } else if (p->num_labels > 0) {
            if (label < 0 || label >= p->num_labels)
                return i;
            rows->classes[row] = (int32_t)label;
        } else {
            int64_t first = first_with_label(p, rows, i);
            rows->classes[row] = first == i ? num_classes++ : rows->classes[row_of(p, first)];
        }
    }
    for (int64_t label = 0; label < p->num_labels; label++)
        rows->classes[p->num_samples + label] = (int32_t)label;
    for (int64_t i = num_trained(p); i < num_anchors(p); i++)
        rows->classes[i] = rows->classes[i - num_trained(p)];
    for (int64_t i = num_rows(p); i < rows->padded; i++)
        rows->classes[i] = PADDING;
    rows->num_classes = num_classes;
    for (int64_t i = 0; i < rows->padded; i++) {
        rows->exists[i] = rows->classes[i] >= 0;
        if (rows->classes[i] >= 0)
            rows->members[rows->classes[i]]++;
    }
    return -1;
}

/* Compute 1 / number of positives and the weight in the loss of each row. */
static void weigh_rows(const struct problem *p, struct rows *rows)
{
    int64_t num_existing = 0, num_counted = 0;
    for (int64_t i = 0; i < rows->padded; i++)
        num_existing += rows->classes[i] >= 0;
    for (int64_t i = 0; i < rows->padded; i++) {
        int32_t members = rows->classes[i] < 0 ? 1 : rows->members[rows->classes[i]];
        int no_negative = p->denominator == NEGATIVES && members == num_existing;
        int no_anchor = i >= num_anchors(p) || no_negative || members == 1;
        rows->inverse_positives[i] = no_anchor ? 0 : 1.0f / (members - 1);
        num_counted += rows->inverse_positives[i] > 0;
    }
    float weight = p->reduction == MEAN && num_counted > 0 ? 1.0f / num_counted : 1.0f;
    for (int64_t i = 0; i < rows->padded; i++)
        rows->weight[i] = rows->inverse_positives[i] > 0 ? weight : 0;
}

INLINE float real(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Without branches, so that the compiler can vectorize, and without denormal floats, which a thread may
 * be set to read as 0. Infinity and NaN keep the largest exponent. */
INLINE float from_half(uint32_t half)
{
    uint32_t magnitude = half & 0x7FFF, sign = (half & 0x8000) << 16;
    uint32_t denormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000u : 0x38000000u);
    return real((magnitude < 0x400 ? denormal : normal) | sign);
}

/* Copy `width` elements from `start` of a part, whatever its dtype, to x. */
INLINE void load_row(const struct problem *p, int part, int64_t start, float *x, int64_t width)
{
    if (p->dtypes[part] == FLOAT32) {
        memcpy(x, (const float *)p->parts[part] + start, sizeof(float) * width);
        return;
    }
    const uint16_t *bits = (const uint16_t *)p->parts[part] + start;
    if (p->dtypes[part] == BFLOAT16)
        for (int64_t k = 0; k < width; k++)
            x[k] = real((uint32_t)bits[k] << 16);
    else
        for (int64_t k = 0; k < width; k++)
            x[k] = from_half(bits[k]);
}

#endif
