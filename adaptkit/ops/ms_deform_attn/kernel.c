/* Multi-scale deformable attention on the CPU, in the notation of this package's docstring.
 *
 * Compiled at run time with -DREAL=float or -DREAL=double. All tensors are contiguous and of that type:
 *
 *     value (N, S, H, D)   locations (N, Q, H, L, P, 2)   weights (N, Q, H, L, P)   out, grad (N, Q, H, D)
 *
 * Work goes block by block, a block being the points of some consecutive queries in one head. Its cells, hats and
 * slopes are found in loops over points, its rows are read in loops over channels; the compiler vectorises both.
 *
 * Nothing depends on the number of threads, not even a rounding. The output and the gradients of points and weights
 * belong to one block each. The gradient of the values is cut into bands of pixel rows of one level and head: whoever
 * has a band walks through all points of that level and head in their order, and adds those that fall into it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef REAL real;

enum {
    BLOCK = 512,              /* the most points in a block */
    AHEAD = 2,                /* how many points the prefetch of rows runs ahead */
    QUERIES_AHEAD = 4,        /* how many queries that of the output does: stores to lines in no cache stall */
    LINE = 64 / sizeof(real), /* numbers in a cache line */
};

typedef struct {
    int64_t batch, pixels, heads, dim, queries, levels, points, threads;
    const int64_t *shapes; /* h, w of each level */
} Call;

/* Some consecutive levels, and for every point of a block what the level that it belongs to is like. */
typedef struct {
    int64_t first, each; /* the first level, the points of a query in all of them */
    real width[BLOCK + AHEAD], height[BLOCK + AHEAD];
    int32_t last[BLOCK + AHEAD][2];                     /* the last cell along x and y */
    int32_t start[BLOCK + AHEAD];                       /* the level's first pixel, from that of the first level */
    int32_t right[BLOCK + AHEAD], below[BLOCK + AHEAD]; /* pixels to the next column, row; 0 if there is but one */
} Levels;

typedef struct {
    real at[BLOCK][2], weight[BLOCK]; /* location and attention weight of a point, later their gradients */
    real x[BLOCK], y[BLOCK];          /* from the cell's first pixel: r in the docstring */
    real corner[4][BLOCK];            /* a number for each pixel of the cell: its weight, or its dot product */
    int32_t pixel[BLOCK + AHEAD];     /* the cell's first pixel */
} Block;

#define INLINE static inline __attribute__((always_inline))
#define FLOOR(x) (sizeof(real) == 4 ? floorf(x) : floor(x))
#define ABS(x) (sizeof(real) == 4 ? fabsf(x) : fabs(x))

/* -------- points */

INLINE int64_t start_of(const Call *call, int64_t level) {
    int64_t start = 0;
    for (int64_t l = 0; l < level; l++) start += call->shapes[2 * l] * call->shapes[2 * l + 1];
    return start;
}

static void set_levels(const Call *call, int64_t first, int64_t count, Levels *levels) {
    levels->first = first;
    levels->each = count * call->points;
    for (int64_t i = 0; i < BLOCK + AHEAD; i++) {
        int64_t l = first + i / call->points % count, h = call->shapes[2 * l], w = call->shapes[2 * l + 1];
        levels->width[i] = w;
        levels->height[i] = h;
        levels->last[i][0] = w > 2 ? w - 2 : 0;
        levels->last[i][1] = h > 2 ? h - 2 : 0;
        levels->start[i] = start_of(call, l) - start_of(call, first);
        levels->right[i] = w > 1;
        levels->below[i] = h > 1 ? w : 0;
    }
}

/* Row of `grad` and `out` (D each) of a query and head; its points begin at L P times that. */
INLINE int64_t bag_of(const Call *call, int64_t n, int64_t h, int64_t q) {
    return (n * call->queries + q) * call->heads + h;
}

INLINE int64_t points_of(const Call *call, const Levels *levels, int64_t bag) {
    return (bag * call->levels + levels->first) * call->points;
}

/* b = clamp(floor(x), 0, last). What is not a number goes to 0: every pixel that is read exists. In integers, for a float
 * holds none above 2^24 exactly; what is beyond all integers goes to the largest float that is one. */
INLINE int32_t cell(real x, int32_t last) {
    const real most = sizeof(real) == 4 ? 2147483520.0 : 2147483647.0;
    real b = FLOOR(x);
    b = b > 0 ? b : 0;
    int32_t whole = b < most ? b : most;
    return whole < last ? whole : last;
}

/* Fill a block with the points of `queries` queries from q on, and find their cells. */
static void load(const Call *call, const Levels *restrict levels, int64_t n, int64_t h, int64_t q, int64_t queries,
                 const real *restrict locations, const real *restrict weights, Block *restrict block) {
    int64_t each = levels->each, points = queries * each;
    for (int64_t i = 0; i < queries; i++) {
        int64_t from = points_of(call, levels, bag_of(call, n, h, q + i));
        memcpy(block->at + i * each, locations + 2 * from, 2 * each * sizeof(real));
        memcpy(block->weight + i * each, weights + from, each * sizeof(real));
    }
    for (int64_t i = 0; i < points; i++) {
        real width = levels->width[i], height = levels->height[i];
        real x = block->at[i][0] * width - (real)0.5, y = block->at[i][1] * height - (real)0.5;
        int32_t column = cell(x, levels->last[i][0]), row = cell(y, levels->last[i][1]);
        block->x[i] = x - column;
        block->y[i] = y - row;
        block->pixel[i] = levels->start[i] + row * levels->below[i] + column; /* one row: it is row 0 */
    }
    for (int64_t i = points; i < points + AHEAD; i++) block->pixel[i] = block->pixel[points - 1];
}

/* max(0, top - |r|), letting NaN through; top is 1, or 0 for the pixel that a level of one column or row lacks. */
INLINE real hat(real r, real top) {
    real height = top - ABS(r);
    return height < 0 ? 0 : height;
}

static void corner_weights(int64_t points, const Levels *restrict levels, Block *restrict block) {
    for (int64_t i = 0; i < points; i++) {
        real x = block->x[i], y = block->y[i], wide = levels->width[i] > 1, high = levels->height[i] > 1;
        real left = hat(x, 1), right = hat(x - 1, wide);
        real above = hat(y, 1) * block->weight[i], below = hat(y - 1, high) * block->weight[i];
        block->corner[0][i] = above * left;
        block->corner[1][i] = above * right;
        block->corner[2][i] = below * left;
        block->corner[3][i] = below * right;
    }
}

/* The derivative to the right of r of the hats of a cell's two pixels. */
INLINE void slopes(real r, real top, real *first, real *second) {
    real before = r >= -1 && r < 0, inside = r >= 0 && r < 1, after = r >= 1 && r < 2;
    *first = before - inside;
    *second = (inside - after) * top;
}

/* Dot products of the corners -> gradients of location and attention weight, in place of these. */
static void differentiate(int64_t points, const Levels *restrict levels, Block *restrict block) {
    for (int64_t i = 0; i < points; i++) {
        real x = block->x[i], y = block->y[i], wide = levels->width[i] > 1, high = levels->height[i] > 1;
        real left = hat(x, 1), right = hat(x - 1, wide), above = hat(y, 1), below = hat(y - 1, high);
        real to_left, to_right, to_above, to_below;
        slopes(x, wide, &to_left, &to_right);
        slopes(y, high, &to_above, &to_below);
        real a = block->corner[0][i], b = block->corner[1][i], c = block->corner[2][i], d = block->corner[3][i];
        real upper = left * a + right * b, lower = left * c + right * d;
        real along_x = above * (to_left * a + to_right * b) + below * (to_left * c + to_right * d);
        real along_y = to_above * upper + to_below * lower;
        block->at[i][0] = along_x * block->weight[i] * levels->width[i];
        block->at[i][1] = along_y * block->weight[i] * levels->height[i];
        block->weight[i] = above * upper + below * lower;
    }
}

/* -------- rows: `row` is the distance between neighbouring pixels of one head, H D */

/* The four pixels of the cell of point i. */
#define CORNERS(i)                                                                                       \
    const real *restrict a = value + block->pixel[i] * row, *restrict b = a + levels->right[i] * row;    \
    const real *restrict c = a + levels->below[i] * row, *restrict d = c + levels->right[i] * row;

INLINE void prefetch(int64_t dim, const Levels *levels, const Block *block, int64_t i, const real *value, int64_t row) {
    CORNERS(i)
    for (int64_t e = 0; e < dim; e += LINE) {
        __builtin_prefetch(a + e);
        __builtin_prefetch(b + e);
        __builtin_prefetch(c + e);
        __builtin_prefetch(d + e);
    }
}

/* out = sum of corner weight times corner row over the points i, ..., end - 1. */
INLINE void read_rows(int64_t dim, const Levels *levels, const Block *block, int64_t i, int64_t end, const real *value,
                      int64_t row, real *restrict out) {
    for (int64_t e = 0; e < dim; e++) out[e] = 0;
    for (; i < end; i++) {
        prefetch(dim, levels, block, i + AHEAD, value, row);
        CORNERS(i)
        real p = block->corner[0][i], q = block->corner[1][i], r = block->corner[2][i], s = block->corner[3][i];
        for (int64_t e = 0; e < dim; e++) out[e] += (p * a[e] + q * b[e]) + (r * c[e] + s * d[e]);
    }
}

/* corner = <grad, corner row> for each of these points. */
INLINE void dot_rows(int64_t dim, const Levels *levels, Block *block, int64_t i, int64_t end, const real *value,
                     int64_t row, const real *restrict grad) {
    for (; i < end; i++) {
        prefetch(dim, levels, block, i + AHEAD, value, row);
        CORNERS(i)
        real p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
        for (int64_t e = 0; e < dim; e++) {
            p += grad[e] * a[e];
            q += grad[e] * b[e];
            r += grad[e] * c[e];
            s += grad[e] * d[e];
        }
        block->corner[0][i] = p;
        block->corner[1][i] = q;
        block->corner[2][i] = r;
        block->corner[3][i] = s;
    }
}

/* Corner row += corner weight times grad, for each of these points and those corners that lie in [from, to). */
INLINE void add_rows(int64_t dim, const Levels *levels, const Block *block, int64_t i, int64_t end, real *map,
                     int64_t row, const real *restrict grad, int64_t from, int64_t to) {
    for (; i < end; i++) {
        int64_t pixel = block->pixel[i];
        for (int corner = 0; corner < 4; corner += 2, pixel += levels->below[i]) {
            if (pixel < from || pixel >= to) continue;
            real *left = map + pixel * row, *right = left + levels->right[i] * row;
            real p = block->corner[corner][i], q = block->corner[corner + 1][i];
            for (int64_t e = 0; e < dim; e++) left[e] += p * grad[e];
            for (int64_t e = 0; e < dim; e++) right[e] += q * grad[e];
        }
    }
}

/* Constant trip counts for the usual sizes of a head, which the compiler unrolls. */
#define FOR_DIM(rows, dim, ...)                \
    switch (dim) {                             \
        case 16: rows(16, __VA_ARGS__); break; \
        case 32: rows(32, __VA_ARGS__); break; \
        case 64: rows(64, __VA_ARGS__); break; \
        default: rows(dim, __VA_ARGS__);       \
    }

/* -------- blocks */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void forward(const Call *call, const real *value, const real *locations, const real *weights, real *out) {
    int64_t each = call->levels * call->points, size = least(BLOCK / each, call->queries);
    int64_t blocks = (call->queries + size - 1) / size, dim = call->dim, row = call->heads * dim;
#pragma omp parallel num_threads(call->threads)
    {
        Levels levels;
        Block block;
        set_levels(call, 0, call->levels, &levels);
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t n = 0; n < call->batch; n++)
            for (int64_t h = 0; h < call->heads; h++)
                for (int64_t b = 0; b < blocks; b++) {
                    int64_t q = b * size, queries = least(size, call->queries - q);
                    const real *map = value + (n * call->pixels * call->heads + h) * dim;
                    load(call, &levels, n, h, q, queries, locations, weights, &block);
                    corner_weights(queries * each, &levels, &block);
                    for (int64_t i = 0; i < queries; i++) {
                        real *bag = out + bag_of(call, n, h, q + i) * dim;
                        for (int64_t e = 0; e < dim; e += LINE) __builtin_prefetch(bag + QUERIES_AHEAD * row + e, 1);
                        FOR_DIM(read_rows, dim, &levels, &block, i * each, (i + 1) * each, map, row, bag)
                    }
                }
    }
}

void backward_points(const Call *call, const real *value, const real *locations, const real *weights,
                     const real *grad, real *grad_locations, real *grad_weights) {
    int64_t each = call->levels * call->points, size = least(BLOCK / each, call->queries);
    int64_t blocks = (call->queries + size - 1) / size, dim = call->dim, row = call->heads * dim;
#pragma omp parallel num_threads(call->threads)
    {
        Levels levels;
        Block block;
        set_levels(call, 0, call->levels, &levels);
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t n = 0; n < call->batch; n++)
            for (int64_t h = 0; h < call->heads; h++)
                for (int64_t b = 0; b < blocks; b++) {
                    int64_t q = b * size, queries = least(size, call->queries - q);
                    const real *map = value + (n * call->pixels * call->heads + h) * dim;
                    load(call, &levels, n, h, q, queries, locations, weights, &block);
                    for (int64_t i = 0; i < queries; i++) {
                        const real *bag = grad + bag_of(call, n, h, q + i) * dim;
                        FOR_DIM(dot_rows, dim, &levels, &block, i * each, (i + 1) * each, map, row, bag)
                    }
                    differentiate(queries * each, &levels, &block);
                    for (int64_t i = 0; i < queries; i++) {
                        int64_t to = points_of(call, &levels, bag_of(call, n, h, q + i));
                        memcpy(grad_locations + 2 * to, block.at + i * each, 2 * each * sizeof(real));
                        memcpy(grad_weights + to, block.weight + i * each, each * sizeof(real));
                    }
                }
    }
}

void backward_value(const Call *call, const real *locations, const real *weights, const real *grad,
                    real *grad_value) {
    int64_t each = call->points, size = least(BLOCK / each, call->queries), dim = call->dim, row = call->heads * dim;
    int64_t maps = call->batch * call->heads * call->levels, bands = 1 + 2 * call->threads / maps;
#pragma omp parallel num_threads(call->threads)
    {
        Levels levels;
        Block block;
#pragma omp for schedule(dynamic) collapse(4)
        for (int64_t n = 0; n < call->batch; n++)
            for (int64_t h = 0; h < call->heads; h++)
                for (int64_t l = 0; l < call->levels; l++)
                    for (int64_t band = 0; band < bands; band++) {
                        int64_t height = call->shapes[2 * l], width = call->shapes[2 * l + 1];
                        int64_t from = height * band / bands * width, to = height * (band + 1) / bands * width;
                        real *map = grad_value + ((n * call->pixels + start_of(call, l)) * call->heads + h) * dim;
                        for (int64_t i = from; i < to; i++) memset(map + i * row, 0, dim * sizeof(real));
                        set_levels(call, l, 1, &levels);
                        for (int64_t q = 0; q < call->queries; q += size) {
                            int64_t queries = least(size, call->queries - q);
                            load(call, &levels, n, h, q, queries, locations, weights, &block);
                            corner_weights(queries * each, &levels, &block);
                            for (int64_t i = 0; i < queries; i++) {
                                const real *bag = grad + bag_of(call, n, h, q + i) * dim;
                                FOR_DIM(add_rows, dim, &levels, &block, i * each, (i + 1) * each, map, row, bag, from,
                                        to)
                            }
                        }
                    }
    }
}
