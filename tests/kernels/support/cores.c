/* Prints for each of 70 regions whether its two threads ended on one core, whether the second one was
 * kept off the first one's, and whether it may use the same cores as before; test_cores.py reads it.
 * In the first `argument` regions both threads begin on one core, in the others the second one may not
 * come there.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#include "cores.h"

int main(int count, char **arguments)
{
    int meetings = count > 1 ? atoi(arguments[1]) : 0;
    cpu_set_t all, first, others;
    sched_getaffinity(0, sizeof all, &all);
    int core = sched_getcpu();
    CPU_ZERO(&first);
    CPU_SET(core, &first);
    others = all;
    if (CPU_COUNT(&all) > 1)
        CPU_CLR(core, &others);
    sched_setaffinity(0, sizeof first, &first);
    for (int region = 0; region < 70; region++) {
        struct cores cores;
        int same = 0, narrowed = 0, restored = 0;
        note_first_core(&cores, 2);
#pragma omp parallel num_threads(2)
        if (omp_get_thread_num() == 1) {
            struct place place;
            cpu_set_t before = others, after;
            if (region < meetings) {
                sched_setaffinity(0, sizeof first, &first);
                before = all;
            }
            sched_setaffinity(0, sizeof before, &before);
            take_core(&cores, 1, &place);
            same = sched_getcpu() == core;
            narrowed = place.is_narrowed;
            leave_core(&place);
            sched_getaffinity(0, sizeof after, &after);
            restored = CPU_EQUAL(&after, &before);
        }
        printf("%d %d %d\n", same, narrowed, restored);
    }
    return 0;
}
