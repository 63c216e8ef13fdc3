/* Calls supcon_loss or supcon_triangle with a problem from a file; test_other_compilers.py writes it. */
#include <stdio.h>
#include <stdlib.h>

#include "cpu_rows.h"

int64_t supcon_scratch(const struct problem *);
int64_t supcon_loss(const struct problem *, float *, int64_t);
int64_t supcon_triangle_scratch(const struct problem *, int64_t, int64_t);
int64_t supcon_triangle(const struct problem *, float *, float *, int64_t, int64_t, int64_t);
int64_t supcon_vectors(void);

static void *memory(size_t size)
{
    void *found = aligned_alloc(64, (size / 64 + 2) * 64);
    if (!found)
        exit(3);
    /* What nobody writes must not be read as a number. */
    memset(found, 0xff, size);
    return found;
}

static void *next(FILE *file, size_t size)
{
    void *found = memory(size);
    if (fread(found, 1, size, file) != size)
        exit(4);
    return found;
}

int main(int count, char **names)
{
    FILE *in = count == 3 ? fopen(names[1], "rb") : 0, *out = in ? fopen(names[2], "wb") : 0;
    if (!out)
        return 2;
    int64_t *sizes = next(in, 9 * sizeof(int64_t)), *call = next(in, 3 * sizeof(int64_t));
    double *temperature = next(in, sizeof(double));
    struct problem p = {
        .num_exits = sizes[0], .num_samples = sizes[1], .num_labels = sizes[2],
        .num_copies = sizes[3], .width = sizes[4], .ignore_index = sizes[5],
        .denominator = sizes[6], .reduction = sizes[7], .num_memory = sizes[8],
        .temperature = *temperature,
    };
    for (int part = 0; part < 5; part++) {
        int64_t *kind = next(in, 2 * sizeof(int64_t));
        p.dtypes[part] = kind[0];
        p.parts[part] = kind[1] ? next(in, kind[1]) : 0;
    }
    p.labels = next(in, (p.num_samples + p.num_memory) * sizeof(int64_t));
    size_t rows = p.num_exits * (p.num_samples + p.num_labels);
    size_t size = rows * p.width * sizeof(float);
    p.losses = memory(p.num_exits * sizeof(float));
    p.gradient = memory(size);
    p.products = memory(rows * sizeof(float));
    int64_t is_triangle = call[0], capacity = call[1], threads = call[2], outside;
    if (is_triangle) {
        float *scratch = memory(supcon_triangle_scratch(&p, capacity, threads) * sizeof(float));
        float *tiles = memory(capacity * 96 * 96 * sizeof(float));
        outside = supcon_triangle(&p, scratch, tiles, capacity, threads, supcon_vectors());
    } else {
        int64_t parts = smaller(threads, p.num_exits);
        outside = supcon_loss(&p, memory(parts * supcon_scratch(&p) * sizeof(float)), threads);
    }
    fwrite(&outside, sizeof outside, 1, out);
    fwrite(p.losses, sizeof(float), p.num_exits, out);
    fwrite(p.gradient, 1, size, out);
    fwrite(p.products, sizeof(float), rows, out);
    return fclose(out) ? 5 : 0;
}
