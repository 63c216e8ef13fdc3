/* Threads of a parallel region moved to different cores, while another process keeps one of them busy.
 *
 * For Linux, two threads of a region on one core and the other process alone on the other are as
 * balanced as a thread of the region on each, so that it may leave them there. But OpenMP's threads spin
 * at the end of a region and after it, for up to 20 ms on a Xeon, and then take the core from the very
 * thread that they wait for.
 */
#ifndef FUSEDACL_CORES_H
#define FUSEDACL_CORES_H

#include <stdint.h>

#ifdef __linux__
#include <sched.h>
#include <string.h>

#ifndef CPU_COUNT
#error "define _GNU_SOURCE before the first header"
#endif

#define MAX_THREADS 256

struct cores {
    int64_t num_arrived;
    int32_t used[MAX_THREADS]; /* core + 1 by order of arrival, 0: not known yet */
};

/* To be called before the region, by its first thread, which is assumed to stay on its core. */
static void note_first_core(struct cores *cores)
{
    memset(cores, 0, sizeof *cores);
    cores->num_arrived = 1;
    cores->used[0] = sched_getcpu() + 1;
}

/* Move a thread away if it is on the core of one that arrived before, and if another one is left. */
static void take_core(struct cores *cores, int64_t thread)
{
    if (thread == 0)
        return;
    int32_t own = sched_getcpu() + 1;
    int64_t place = __atomic_fetch_add(&cores->num_arrived, 1, __ATOMIC_RELAXED), shares = 0;
    cpu_set_t allowed, left, found;
    if (place >= MAX_THREADS || own <= 0)
        return;
    __atomic_store_n(cores->used + place, own, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < place; i++)
        shares |= __atomic_load_n(cores->used + i, __ATOMIC_RELAXED) == own;
    if (!shares || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    left = allowed;
    for (int64_t i = 0; i < place; i++) {
        int32_t used = __atomic_load_n(cores->used + i, __ATOMIC_RELAXED);
        if (used > 0)
            CPU_CLR(used - 1, &left);
    }
    if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof left, &left))
        return;
    __atomic_store_n(cores->used + place, sched_getcpu() + 1, __ATOMIC_RELAXED);
    /* All cores, of which the kernel takes those that the container has: a thread that asked for these
     * alone would not get those that are added later. */
    memset(&left, 0xff, sizeof left);
    if (sched_setaffinity(0, sizeof left, &left) || sched_getaffinity(0, sizeof found, &found) ||
        !CPU_EQUAL(&found, &allowed))
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
struct cores {
    char none;
};
#define note_first_core(CORES) ((void)(CORES))
#define take_core(CORES, THREAD) ((void)(CORES), (void)(THREAD))
#endif
#endif
