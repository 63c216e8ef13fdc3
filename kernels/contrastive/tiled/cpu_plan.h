/* Sizes, options and memory of one call of cpu_triangle.c. */
#ifndef CPU_PLAN_H
#define CPU_PLAN_H

#include "cpu_rows.h"

/* Rows and columns of a tile, which has 36 KiB: multiples of every ROWS and COLUMNS below. */
#define TILE 96
/* Columns of y that lie together for the product with weights; a multiple of every COLUMNS. */
#define PANEL 32
/* Products added before their sum is added to a tile's: rounding grows with their number. */
#define DEPTH 128
/* Partial sums of a row: each covers a group of blocks. */
#define MAX_GROUPS 64
/* Blocks of a group at least: its tiles share blocks that stay in the cache. */
#define MIN_GROUP 2
#define LN2 0.693147180559945309417

/* A pass over pairs alone, where the rest is computed elsewhere; Pairs in cpu_triangle.py has the same
 * fields. */
struct pairs {
    const float *y, *exists; /* [M][d], and [M] or null: all rows exist */
    const int32_t *classes;  /* [M] */
    const float *scales;     /* [M]: row i has exp(scale_i s), or null: all rows have exp(s) */
    const float *u;          /* [M], for the gradient, else null */
    float *result;           /* D [n], or G [n][d], of the first n rows */
    float *products;         /* [n]: sums of e times s, beside D, or null */
    /* M; n; beside D the first rows whose exponentials are kept for the gradient; and beside G whether
     * the tiles hold those. */
    int64_t num_rows, num_own, num_kept_rows, are_kept, width, denominator;
    double temperature;
};

/* Tasks of a phase: the next one, and how many are done. */
struct phase {
    int64_t next, done;
    char apart[48];
};

/* Memory to be fetched to the cache, and by how many floats it goes on with every step. */
struct ahead {
    const float *first;
    int64_t first_step;
    const float *second;
    int64_t second_step;
};

struct functions;

struct plan {
    const struct problem *p;     /* null for a pass over pairs alone */
    const struct pairs *pairs_p; /* null otherwise */
    const struct functions *f;
    struct rows rows;
    float *inverse_norm, *losses; /* [padded], [E][padded] */
    float *transposed;            /* [blocks][d][TILE]: y */
    float *panels;                /* [num_panels][padded][PANEL]: y */
    float *class_sums;            /* [num_panels][num_classes][PANEL]: Y */
    float *mean_sums;             /* like Y: (Y + sums over anchors) / 2; Y where all are anchors */
    float *slots;                 /* [num_groups][sum_blocks * TILE]: shares of D, then of products */
    float *products;              /* [trained_blocks][num_panels][TILE][PANEL]: G */
    float *kept;                  /* [capacity][TILE][TILE]: e, then weights of other tiles */
    float *own;                   /* [num_threads][own_size] */
    struct phase *phases;
    int32_t *numbers, *nothing, *incomplete; /* [padded], [TILE], [blocks] */
    float *given_u, *given_scales;           /* [padded] */
    const float *u, *scales;                 /* those, or null */
    int64_t sums_products, slots_size, are_kept, all_are_kept;
    int64_t num_needed; /* rows with a sum or a gradient: the first ones */
    int64_t num_rows, num_trained, padded, width, num_panels, num_classes, denominator;
    int64_t blocks, sum_blocks, trained_blocks, num_tiles, capacity; /* num_tiles: of the gradient */
    int64_t group, num_groups, strip, num_phases, num_threads, own_size;
    float scale, unscale, gradient_scale;
    /* Rounding made all s longer by this share, which would change the temperature. */
    float excess;
};

/* The work on tiles and rows, by kind of processor. */
struct functions {
    void (*compute_tile)(const struct plan *, int64_t, int64_t, float *, const float *, float *,
                         float *);
    void (*contribute)(const struct plan *, const float *, int, int64_t, int64_t, const float *,
                       const float *, int64_t, float *, float *, const float *);
    void (*pack_block)(const struct plan *, int64_t, int64_t, float *);
    void (*sum_classes)(const struct plan *, int64_t);
    float (*sum_positives)(const struct plan *, int64_t);
    void (*finish_row)(const struct plan *, int64_t, int64_t, float *);
};

/* Place of a tile among those on or above the diagonal, row by row. */
static int64_t tile_index(const struct plan *q, int64_t i, int64_t j)
{
    return i * q->blocks - i * (i - 1) / 2 + j - i;
}

/* Fill in sizes and place the arrays in memory from `start`; return their number of floats. */
static int64_t lay_out(struct plan *q, float *start, int64_t capacity, int64_t num_threads)
{
    int64_t num_exits = q->p ? q->p->num_exits : 1, used = 0;
    int gives_gradient = q->p ? q->p->gradient != 0 : q->pairs_p->u != 0;
    q->padded = rounded_up(q->num_rows, TILE);
    q->blocks = q->padded / TILE;
    q->trained_blocks = (q->num_trained + TILE - 1) / TILE;
    q->num_tiles = tile_index(q, q->trained_blocks, q->trained_blocks);
    q->capacity = smaller(capacity, q->num_tiles);
    q->all_are_kept = q->are_kept && q->capacity == q->num_tiles;
    q->num_panels = (q->width + PANEL - 1) / PANEL;
    q->group = larger((q->blocks + MAX_GROUPS - 1) / MAX_GROUPS, MIN_GROUP);
    q->num_groups = (q->blocks + q->group - 1) / q->group;
    q->num_threads = num_threads;
    q->strip = q->trained_blocks >= 16 * num_threads ? TILE : TILE / 2;
    q->num_phases = num_exits * (3 + 2 * (q->capacity ? q->num_tiles / q->capacity + 1 : 0));
    q->own_size = rounded_up(TILE * TILE + q->padded + q->num_panels * PANEL, 16) + 16;
    q->rows.padded = q->padded;
    q->rows.table_size = q->p ? label_table_size(q->p) : 16;
#define TAKE(NAME, COUNT) (q->NAME = (void *)(start + used), used += rounded_up(COUNT, 16))
    TAKE(phases, q->num_phases * (int64_t)(sizeof(struct phase) / sizeof(float)));
    TAKE(transposed, q->padded * q->width);
    TAKE(panels, q->padded * q->num_panels * PANEL);
    TAKE(class_sums, q->num_classes * q->num_panels * PANEL);
    q->mean_sums = q->class_sums;
    if (q->num_needed < q->num_rows)
        TAKE(mean_sums, q->num_classes * q->num_panels * PANEL);
    q->slots_size = q->num_groups * q->sum_blocks * TILE;
    TAKE(slots, q->slots_size * (1 + q->sums_products));
    TAKE(products, gives_gradient ? q->trained_blocks * TILE * q->num_panels * PANEL : 0);
    TAKE(own, q->own_size * num_threads);
    TAKE(inverse_norm, q->padded);
    TAKE(losses, q->padded * num_exits);
    TAKE(rows.exists, q->padded);
    TAKE(rows.inverse_positives, q->padded);
    TAKE(rows.weight, q->padded);
    TAKE(rows.classes, q->padded);
    TAKE(rows.members, q->padded);
    TAKE(rows.table, q->rows.table_size);
    TAKE(numbers, q->padded);
    TAKE(nothing, TILE);
    TAKE(incomplete, q->blocks);
    TAKE(given_u, q->padded);
    TAKE(given_scales, q->padded);
#undef TAKE
    return used;
}

#endif
