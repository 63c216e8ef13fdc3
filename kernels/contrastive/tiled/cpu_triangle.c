/* The contrastive loss of many rows and its gradient, tile by tile on and above the diagonal.
 *
 * All of it is one parallel region: threads take the next task of a phase when they are done with
 * their last one, so that a thread without a core delays the others by one task. No sum depends on who
 * computes what: each has one owner, which adds its terms in a fixed order.
 *
 * Formulas and names are those of loss.py, but y is longer by sqrt(log2(e)), so that e = 2^(y . y).
 * Plain C without Python's headers, called through ctypes (cpu_triangle.py).
 */
#define _GNU_SOURCE /* for cores.h */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#include "../../support/cores.h"
#include "cpu_plan.h"

/* Microseconds: Linux takes a core from a process after 4 ms, or less. */
#define PATIENCE 5000
/* Tries before the clock is read. */
#define FREE_TRIES 64

/* Copy row i to x. */
static void load(const struct plan *q, int64_t exit, int64_t i, float *x)
{
    const struct problem *p = q->p;
    if (!p) {
        memcpy(x, q->pairs_p->y + i * q->width, sizeof(float) * q->width);
        return;
    }
    int part = 0;
    for (int64_t size; part < 2 * p->num_copies &&
                       i >= (size = part % 2 ? p->num_labels : p->num_samples); part++)
        i -= size;
    part = part < 2 * p->num_copies ? part : 4;
    /* Teachers are shared by the exits. */
    if (part < 2)
        i += exit * (part ? p->num_labels : p->num_samples);
    load_row(p, part, i * q->width, x, q->width);
}

/* Clang has no such pragma, so that there the code for any processor is all there is. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_WIDER
#endif

#ifdef HAS_WIDER
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,fma")
#define LANES 16
#define ROWS 12
#define NAME(NAME) NAME##_avx512
#include "cpu_tiles.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define ROWS 6
#define NAME(NAME) NAME##_avx2
#include "cpu_tiles.h"
#pragma GCC pop_options
#endif
#define LANES 4
#ifdef __aarch64__ /* 32 registers of four floats */
#define ROWS 12
#else
#define ROWS 6
#endif
#define NAME(NAME) NAME##_plain
#include "cpu_tiles.h"

/* Return the widest vectors of this processor: 0 plain, 1 AVX2, 2 AVX-512; -1 where the compiler could
 * not make use of them, so that the vendor's products are faster. */
int64_t supcon_vectors(void)
{
#ifdef HAS_WIDER
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__x86_64__)
    return -1;
#else
    return 0;
#endif
}

static const struct functions *functions_of(int64_t vectors)
{
#ifdef HAS_WIDER
    if (vectors > 0)
        return vectors > 1 ? &functions_avx512 : &functions_avx2;
#endif
    return &functions_plain;
}

static int64_t claim(struct phase *phase)
{
    return __atomic_fetch_add(&phase->next, 1, __ATOMIC_RELAXED);
}

static void finish(struct phase *phase)
{
    __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
}

static int64_t microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Wait until all tasks of a phase are done. A thread that waits longer than another process usually
 * keeps a core goes to sleep: its core is then idle, and the kernel moves a thread to it that waits
 * for a busy one. */
static void wait_for(struct phase *phase, int64_t num_tasks)
{
    const struct timespec nap = {0, 20000};
    int64_t start = 0;
    for (int tries = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < num_tasks; tries++) {
        if (tries == FREE_TRIES)
            start = microseconds();
        if (tries > FREE_TRIES && microseconds() - start > PATIENCE)
            nanosleep(&nap, 0);
        else
            sched_yield();
    }
}

/* Compute a group of tiles and the shares of D that it has. */
static void take_pairs(const struct plan *q, int64_t task, float *tile)
{
    int64_t gi = 0, stride = q->sum_blocks * TILE;
    for (; task >= q->num_groups - gi; gi++)
        task -= q->num_groups - gi;
    int64_t gj = gi + task, i_start = gi * q->group, j_start = gj * q->group;
    int64_t i_stop = smaller(i_start + q->group, q->sum_blocks);
    int64_t j_stop = smaller(j_start + q->group, q->blocks);
    float *of_rows = q->slots + gj * stride, *of_columns = q->slots + gi * stride;
    int64_t summed = smaller(j_stop, q->sum_blocks) - j_start;
    for (int64_t start = 0; start <= q->sums_products * q->slots_size; start += q->slots_size) {
        memset(of_rows + start + i_start * TILE, 0, sizeof(float) * (i_stop - i_start) * TILE);
        if (summed > 0)
            memset(of_columns + start + j_start * TILE, 0, sizeof(float) * summed * TILE);
    }
    for (int64_t i = i_start; i < i_stop; i++)
        for (int64_t j = i > j_start ? i : j_start; j < j_stop; j++) {
            int64_t index = tile_index(q, i, j);
            int serves_both = i != j && j < q->sum_blocks;
            q->f->compute_tile(q, i, j, index < q->capacity ? q->kept + index * TILE * TILE : tile,
                               0, of_rows + i * TILE, serves_both ? of_columns + j * TILE : 0);
        }
}

/* Add the shares that groups have in a sum of a block's rows. */
static void add_slots(const struct plan *q, const float *slots, int64_t block, double *total)
{
    memset(total, 0, sizeof(double) * TILE);
    for (int64_t group = 0; group < q->num_groups; group++)
        for (int64_t row = 0; row < TILE; row++)
            total[row] += slots[(group * q->sum_blocks + block) * TILE + row];
}

/* Compute D of a block's rows. */
static void sum_slots(const struct plan *q, int64_t block, float *sums)
{
    double total[TILE];
    add_slots(q, q->slots, block, total);
    /* A row with nothing to compare has D = 0 and does not count: 0 * log D is 0. */
    for (int64_t row = 0; row < TILE; row++)
        sums[row] = total[row] < SMALLEST ? SMALLEST : (float)total[row];
}

/* Compute D and, where they are wanted, sums of products of a block's rows. */
static void take_sums(const struct plan *q, int64_t block)
{
    double total[TILE];
    sum_slots(q, block, q->losses + block * TILE);
    if (!q->sums_products)
        return;
    add_slots(q, q->slots + q->slots_size, block, total);
    for (int64_t i = block * TILE; i < smaller((block + 1) * TILE, q->pairs_p->num_own); i++)
        q->pairs_p->products[i] = (float)total[i - block * TILE];
}

static void take_losses(const struct plan *q, int64_t exit, int64_t block)
{
    float sums[TILE], *losses = q->losses + exit * q->padded;
    sum_slots(q, block, sums);
    for (int64_t i = block * TILE; i < smaller((block + 1) * TILE, q->num_needed); i++) {
        float positives = q->rows.classes[i] < 0 ? 0 : q->f->sum_positives(q, i) * (float)LN2;
        losses[i] = q->rows.weight[i] *
                    (logf(sums[i - block * TILE]) - positives * q->rows.inverse_positives[i]);
    }
}

/* Add to G of a strip of rows what the tiles from `start` to `stop` contribute, and at the end write
 * the rows' gradients. */
static void take_gradient(const struct plan *q, int64_t exit, int64_t task, int64_t start,
                          int64_t stop, const float *u, float *scratch)
{
    int64_t strips = TILE / q->strip, block = task / strips, first = task % strips * q->strip;
    /* The last strips may have fewer rows, or none; a multiple of every ROWS. */
    int64_t count = smaller(q->strip, rounded_up(q->num_trained - block * TILE - first, 12));
    if (count <= 0)
        return;
    float *products = q->products + block * q->num_panels * TILE * PANEL + first * PANEL;
    int64_t other = 0, last = q->blocks;
    if (start == 0)
        for (int64_t c = 0; c < q->num_panels; c++)
            memset(products + c * TILE * PANEL, 0, sizeof(float) * q->strip * PANEL);
#define INDEX(OTHER) ((OTHER) < block ? tile_index(q, OTHER, block) : tile_index(q, block, OTHER))
    while (other < last && INDEX(other) < start)
        other++;
    while (last > other && INDEX(last - 1) >= stop)
        last--;
    for (; other < last; other++) {
        const float *tile = q->kept + (INDEX(other) - start) * TILE * TILE;
        const float *ahead = other + 1 < last ? q->kept + (INDEX(other + 1) - start) * TILE * TILE
                                              : tile;
        q->f->contribute(q, tile, other < block, first, count,
                         start == 0 && (q->p || q->are_kept) ? u + block * TILE + first : 0,
                         u + other * TILE,
                         other, products, scratch, ahead);
    }
#undef INDEX
    if (stop < q->num_tiles)
        return;
    for (int64_t row = 0; row < count; row++) {
        int64_t i = block * TILE + first + row;
        if (i < q->num_trained)
            q->f->finish_row(q, exit, i, products + row * PANEL);
    }
}

/* Do a thread's part of one exit, from its phase on; return the first phase of the next exit. */
static struct phase *take_part(const struct plan *q, int64_t exit, struct phase *phase, float *own)
{
    float *scratch = own, *own_u = own + TILE * TILE, *row = own_u + q->padded;
    int gives_gradient = q->p ? q->p->gradient != 0 : q->u != 0;
    const float *u = q->u;
    int64_t num_tasks = q->blocks;
#define EACH_TASK for (int64_t task; (task = claim(phase)) < num_tasks; finish(phase))
    EACH_TASK q->f->pack_block(q, exit, task, row);
    wait_for(phase++, num_tasks);

    if (!q->u) {
        int64_t rows_of_groups = (q->sum_blocks + q->group - 1) / q->group;
        int64_t num_sums = q->p ? q->num_panels : 0;
        num_tasks = num_sums + rows_of_groups * q->num_groups -
                    rows_of_groups * (rows_of_groups - 1) / 2;
        EACH_TASK if (task < num_sums) q->f->sum_classes(q, task);
        else take_pairs(q, task - num_sums, scratch);
        wait_for(phase++, num_tasks);
    }
    if (q->p && gives_gradient) {
        /* Every thread for itself: cheaper than to wait for each other once more. */
        for (int64_t block = 0; block < q->sum_blocks; block++)
            sum_slots(q, block, own_u + block * TILE);
        for (int64_t i = 0; i < q->padded; i++)
            own_u[i] = i < q->num_needed ? q->rows.weight[i] / own_u[i] : 0;
        u = own_u;
    }
    struct phase *losses = 0;
    if (q->p || !gives_gradient) {
        num_tasks = q->sum_blocks;
        EACH_TASK if (q->p) take_losses(q, exit, task);
        else take_sums(q, task);
        losses = phase++;
    }
    for (int64_t start = 0; gives_gradient && start < q->num_tiles; start += q->capacity) {
        int64_t stop = smaller(start + q->capacity, q->num_tiles);
        if (start > 0 || (q->u && !q->are_kept)) {
            num_tasks = stop - start;
            EACH_TASK {
                int64_t i = 0, j = start + task;
                for (; j >= q->blocks - i; i++)
                    j -= q->blocks - i;
                q->f->compute_tile(q, i, i + j, q->kept + task * TILE * TILE, u, 0, 0);
            }
            wait_for(phase++, num_tasks);
        }
        num_tasks = q->trained_blocks * (TILE / q->strip);
        EACH_TASK take_gradient(q, exit, task, start, stop, u, scratch);
        wait_for(phase++, num_tasks);
    }
    /* The next exit overwrites what they read. */
    if (losses)
        wait_for(losses, q->sum_blocks);
#undef EACH_TASK
    return phase;
}

static void run(const struct plan *q)
{
    int64_t num_exits = q->p ? q->p->num_exits : 1;
    struct cores cores;
    struct phase last = {0};
    memset(q->phases, 0, sizeof(struct phase) * q->num_phases);
    if (q->num_threads > 1)
        note_first_core(&cores);
#pragma omp parallel num_threads(q->num_threads) if (q->num_threads > 1)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        struct phase *phase = q->phases;
        float *own = q->own + thread * q->own_size;
        take_core(&cores, thread);
        for (int64_t exit = 0; exit < num_exits; exit++)
            phase = take_part(q, exit, phase, own);
        /* Not in OpenMP, which would spin. */
        finish(&last);
        if (thread == 0)
            wait_for(&last, team);
    }
}

/* Fill in numbers, nothing and incomplete, by which compute_tile masks pairs. */
static void prepare_masks(struct plan *q)
{
    for (int64_t i = 0; i < q->padded; i++)
        q->numbers[i] = (int32_t)i;
    for (int64_t i = 0; i < TILE; i++)
        q->nothing[i] = -3;
    for (int64_t block = 0; block < q->blocks; block++) {
        q->incomplete[block] = 0;
        for (int64_t i = block * TILE; i < (block + 1) * TILE; i++)
            q->incomplete[block] |= q->rows.exists[i] == 0;
    }
}

/* Make y longer than a unit row, or than the given one, so that s is divided by `divisor`. */
static void set_scale(struct plan *q, double divisor)
{
    q->scale = (float)sqrt(1 / divisor);
    q->unscale = (float)sqrt(divisor);
    q->excess = (float)((double)q->scale * q->scale * divisor - 1);
}

static struct plan plan_of(const struct problem *p)
{
    struct plan q = {.p = p, .width = p->width, .num_rows = num_rows(p)};
    q.num_trained = num_trained(p);
    q.num_needed = num_anchors(p);
    q.sum_blocks = (q.num_needed + TILE - 1) / TILE;
    q.num_classes = p->num_labels ? p->num_labels : p->num_samples + p->num_memory;
    q.denominator = p->denominator;
    set_scale(&q, p->temperature * LN2);
    q.gradient_scale = (float)LN2;
    return q;
}

static struct plan plan_of_pass(const struct pairs *p)
{
    struct plan q = {.pairs_p = p, .width = p->width, .num_rows = p->num_rows};
    q.num_trained = p->u ? p->num_own : p->num_kept_rows;
    q.num_needed = p->num_own;
    q.sum_blocks = (p->num_own + TILE - 1) / TILE;
    q.denominator = p->denominator;
    q.sums_products = p->products != 0;
    q.are_kept = p->are_kept;
    set_scale(&q, p->temperature * LN2);
    return q;
}

/* Ask for large pages, of which the processor has to look up fewer: a tenth faster at M = 4096, d = 64.
 * To be called before the memory is first used; a kernel without them ignores it. */
void supcon_use_large_pages(float *memory, int64_t size)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, start = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t stop = (uintptr_t)(memory + size) / page * page;
    if (start < stop)
        madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

/* Return the number of floats of scratch memory. */
int64_t supcon_triangle_scratch(const struct problem *p, int64_t capacity, int64_t num_threads)
{
    struct plan q = plan_of(p);
    return lay_out(&q, 0, capacity, num_threads);
}

int64_t supcon_pass_scratch(const struct pairs *p, int64_t capacity, int64_t num_threads)
{
    struct plan q = plan_of_pass(p);
    return lay_out(&q, 0, capacity, num_threads);
}

/* Compute losses and gradients of all exits. kept: memory for `capacity` tiles; exponentials that do
 * not fit are computed again for the gradient. Return the position of a label outside [0, K), or -1. */
int64_t supcon_triangle(const struct problem *p, float *scratch, float *kept, int64_t capacity,
                        int64_t num_threads, int64_t vectors)
{
    struct plan q = plan_of(p);
    lay_out(&q, scratch, capacity, num_threads);
    q.kept = kept;
    q.f = functions_of(vectors);
    int64_t outside = find_classes(p, &q.rows);
    if (outside >= 0)
        return outside;
    weigh_rows(p, &q.rows);
    prepare_masks(&q);
    run(&q);
    for (int64_t exit = 0; exit < p->num_exits; exit++) {
        double loss = 0;
        for (int64_t i = 0; i < q.num_needed; i++)
            loss += q.losses[exit * q.padded + i];
        p->losses[exit] = (float)loss;
    }
    return -1;
}

/* Compute D of the own rows or, with u, their G. */
void supcon_pass(const struct pairs *p, float *scratch, float *kept, int64_t capacity,
                 int64_t num_threads, int64_t vectors)
{
    struct plan q = plan_of_pass(p);
    lay_out(&q, scratch, capacity, num_threads);
    q.kept = kept;
    q.f = functions_of(vectors);
    for (int64_t i = 0; i < q.padded; i++) {
        int inside = i < p->num_rows;
        q.rows.exists[i] = inside && (!p->exists || p->exists[i]);
        q.rows.classes[i] = inside ? p->classes[i] : PADDING;
        if (p->u)
            q.given_u[i] = inside ? p->u[i] : 0;
        if (p->scales)
            q.given_scales[i] = inside ? p->scales[i] : 0;
    }
    q.u = p->u ? q.given_u : 0;
    q.scales = p->scales ? q.given_scales : 0;
    prepare_masks(&q);
    run(&q);
    if (!p->u)
        memcpy(p->result, q.losses, sizeof(float) * p->num_own);
}
