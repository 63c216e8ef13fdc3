/* x . y, |x|^2 and |y|^2 of two arrays, and their combination, reading each once.
 *
 * PyTorch has no operation for the sums, and a combination of hundreds of arrays would be hundreds of
 * parallel regions, each of which waits for its last thread. Plain C without Python's headers, called
 * through ctypes (cpu.py) for many pairs of arrays at once, because a list of gradients has hundreds
 * of short ones.
 */
#include <stdint.h>

/* A checksum of the files that this was built from; setup.py defines it, c_loops.py compares it. */
#ifndef SOURCES
#define SOURCES 0
#endif
const uint32_t fusedacl_sources = SOURCES;

/* Independent sums, so that the compiler can vectorize without reordering a sum: six 512-bit or
 * twelve 256-bit registers. */
#define LANES 32
/* Number of terms added in the precision of the arrays; sums of blocks are added in double. */
#define BLOCK 8192

/* One binary for every x86-64: the loader chooses the widest vectors that the machine has. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define WIDEST
#endif

#define PAIR_SUMS(NAME, REAL)                                                                    \
    WIDEST static void NAME##_piece(const REAL *x, const REAL *y, int64_t count, double *sums)   \
    {                                                                                            \
        double dot = 0, x_squared = 0, y_squared = 0;                                            \
        for (int64_t start = 0; start < count; start += BLOCK) {                                 \
            int64_t stop = count - start < BLOCK ? count : start + BLOCK;                        \
            int64_t i = start;                                                                   \
            REAL xy[LANES] = {0}, xx[LANES] = {0}, yy[LANES] = {0};                              \
            for (; i + LANES <= stop; i += LANES)                                                \
                for (int lane = 0; lane < LANES; lane++) {                                       \
                    REAL p = x[i + lane], q = y[i + lane];                                       \
                    xy[lane] += p * q;                                                           \
                    xx[lane] += p * p;                                                           \
                    yy[lane] += q * q;                                                           \
                }                                                                                \
            for (int lane = 0; i < stop; i++, lane++) {                                          \
                REAL p = x[i], q = y[i];                                                         \
                xy[lane] += p * q;                                                               \
                xx[lane] += p * p;                                                               \
                yy[lane] += q * q;                                                               \
            }                                                                                    \
            for (int lane = 0; lane < LANES; lane++) {                                           \
                dot += xy[lane];                                                                 \
                x_squared += xx[lane];                                                           \
                y_squared += yy[lane];                                                           \
            }                                                                                    \
        }                                                                                        \
        sums[0] = dot;                                                                           \
        sums[1] = x_squared;                                                                     \
        sums[2] = y_squared;                                                                     \
    }                                                                                            \
                                                                                                 \
    /* pieces [num_pieces][3]: address of x, address of y, count; sums [num_pieces][3]. */       \
    void NAME(const int64_t *pieces, int64_t num_pieces, double *sums, int64_t num_threads)      \
    {                                                                                            \
        _Pragma("omp parallel for schedule(dynamic) num_threads(num_threads) if(num_threads > 1)") \
        for (int64_t i = 0; i < num_pieces; i++)                                                 \
            NAME##_piece((const REAL *)(intptr_t)pieces[3 * i],                                  \
                         (const REAL *)(intptr_t)pieces[3 * i + 1], pieces[3 * i + 2],           \
                         sums + 3 * i);                                                          \
    }

PAIR_SUMS(pair_sums_float, float)
PAIR_SUMS(pair_sums_double, double)

#define COMBINE(NAME, REAL)                                                                      \
    WIDEST static void NAME##_piece(REAL *x, const REAL *y, int64_t count, REAL weight,          \
                                    REAL factor)                                                 \
    {                                                                                            \
        if (!y)                                                                                  \
            for (int64_t i = 0; i < count; i++)                                                  \
                x[i] *= factor;                                                                  \
        else if (weight < (REAL)0.5)                                                             \
            for (int64_t i = 0; i < count; i++)                                                  \
                x[i] = (x[i] + weight * (y[i] - x[i])) * factor;                                 \
        else /* so that a weight of 1 gives y exactly */                                         \
            for (int64_t i = 0; i < count; i++)                                                  \
                x[i] = (y[i] - (y[i] - x[i]) * (1 - weight)) * factor;                           \
    }                                                                                            \
                                                                                                 \
    /* pieces as above, where a y of 0 is absent; options [num_pieces][2]: weight, factor. */    \
    void NAME(const int64_t *pieces, int64_t num_pieces, const double *options,                  \
              int64_t num_threads)                                                               \
    {                                                                                            \
        _Pragma("omp parallel for schedule(dynamic) num_threads(num_threads) if(num_threads > 1)") \
        for (int64_t i = 0; i < num_pieces; i++)                                                 \
            NAME##_piece((REAL *)(intptr_t)pieces[3 * i],                                        \
                         (const REAL *)(intptr_t)pieces[3 * i + 1], pieces[3 * i + 2],           \
                         (REAL)options[2 * i], (REAL)options[2 * i + 1]);                        \
    }

COMBINE(combine_float, float)
COMBINE(combine_double, double)
