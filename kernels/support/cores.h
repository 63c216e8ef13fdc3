/* Threads of a parallel region on different cores, while another process keeps one of them busy.
 *
 * Linux leaves two threads of a region on one core and another process alone on the other: that is as
 * even as the reverse. But OpenMP's threads spin at the end of a region and after it, for up to 20 ms,
 * and take the core from the very thread that they wait for. Where threads of a region met on a core
 * lately, each is kept off the cores of those before it, until the region ends.
 */
#ifndef FUSEDACL_CORES_H
#define FUSEDACL_CORES_H

#include <stdint.h>

#ifdef __linux__
#include <sched.h>

#define MAX_THREADS 256
/* Number of regions for which threads are kept apart after two of them met. */
#define LATELY 64

struct cores {
    int32_t used[MAX_THREADS]; /* by thread: its core + 1, 0 before it arrives */
};

struct place {
    cpu_set_t allowed;
    int is_narrowed;
};

static int32_t regions_left;

/* Note where the first thread is, which stays there; to be called before the region. */
static void note_first_core(struct cores *cores, int64_t num_threads)
{
    cores->used[0] = sched_getcpu() + 1;
    for (int64_t i = 1; i < num_threads && i < MAX_THREADS; i++)
        cores->used[i] = 0;
    if (__atomic_load_n(&regions_left, __ATOMIC_RELAXED) > 0)
        __atomic_fetch_sub(&regions_left, 1, __ATOMIC_RELAXED);
}

/* Return the core + 1 of a thread that is here, else 0. */
static int32_t core_of(struct cores *cores, int64_t thread)
{
    return __atomic_load_n(cores->used + thread, __ATOMIC_RELAXED);
}

/* Keep a thread off the cores of those before it, if that leaves one, until it calls leave_core. */
static void take_core(struct cores *cores, int64_t thread, struct place *place)
{
    int32_t own = sched_getcpu() + 1;
    place->is_narrowed = 0;
    if (thread == 0 || thread >= MAX_THREADS || own <= 0)
        return;
    __atomic_store_n(cores->used + thread, own, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < thread; i++)
        if (core_of(cores, i) == own)
            __atomic_store_n(&regions_left, LATELY, __ATOMIC_RELAXED);
    if (__atomic_load_n(&regions_left, __ATOMIC_RELAXED) <= 0 ||
        sched_getaffinity(0, sizeof place->allowed, &place->allowed))
        return;
    cpu_set_t left = place->allowed;
    for (int64_t i = 0; i < thread; i++)
        if (core_of(cores, i) > 0)
            CPU_CLR(core_of(cores, i) - 1, &left);
    if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof left, &left))
        return;
    place->is_narrowed = 1;
    __atomic_store_n(cores->used + thread, sched_getcpu() + 1, __ATOMIC_RELAXED);
}

static void leave_core(const struct place *place)
{
    if (place->is_narrowed)
        sched_setaffinity(0, sizeof place->allowed, &place->allowed);
}
#else
struct cores {
    char none;
};
struct place {
    char none;
};
#define note_first_core(CORES, NUM_THREADS) ((void)(CORES))
#define take_core(CORES, THREAD, PLACE) ((void)(CORES), (void)(PLACE))
#define leave_core(PLACE) ((void)(PLACE))
#endif
#endif
