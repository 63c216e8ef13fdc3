/* Prints for each of 70 regions whether its two threads, which began on one core, ended on one, and
 * whether the second one may use the same cores as before; test_cores.py reads it. Arguments: the cores
 * that the process may use, instead of all.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#include "cores.h"

int main(int count, char **arguments)
{
    cpu_set_t all, first;
    CPU_ZERO(&all);
    for (int i = 1; i < count; i++)
        CPU_SET(atoi(arguments[i]), &all);
    if (count > 1)
        sched_setaffinity(0, sizeof all, &all);
    sched_getaffinity(0, sizeof all, &all);
    int core = sched_getcpu();
    CPU_ZERO(&first);
    CPU_SET(core, &first);
    sched_setaffinity(0, sizeof first, &first);
    for (int region = 0; region < 70; region++) {
        struct cores cores;
        int same = 0, restored = 0;
        note_first_core(&cores);
#pragma omp parallel num_threads(2)
        if (omp_get_thread_num() == 1) {
            cpu_set_t after;
            sched_setaffinity(0, sizeof first, &first);
            sched_setaffinity(0, sizeof all, &all);
            take_core(&cores, 1);
            same = sched_getcpu() == core;
            sched_getaffinity(0, sizeof after, &after);
            restored = CPU_EQUAL(&after, &all);
        }
        printf("%d %d\n", same, restored);
    }
    return 0;
}
