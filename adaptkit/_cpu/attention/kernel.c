/* The gradient of softmax attention on the CPU, tile by tile (Dao et al., FlashAttention, NeurIPS 2022, appendix B).
 *
 *     S = scale Q K',  P = exp(S - lse),  O = P V                           rows of P sum to one: lse is known
 *     dV = P' dO,  dP = dO V',  dS = scale P (dP - delta),  delta = sum(dO * O)
 *     dQ = dS K,  dK = dS' Q
 *
 * P is made again, TILE_Q queries by TILE_K keys at a time; each image and head is the work of one thread, so that
 * nothing depends on their number. All five products are one small kernel: ROWS rows by some vectors of the result stay
 * in registers while vectors of B are read and numbers of A are spread over a vector. float32, compiled at run time.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64, VECTORS = 4 }; /* of a register; side by side in a result: with ROWS they fill the registers */
#elif defined(__AVX__)
enum { BYTES = 32, VECTORS = 2 };
#else
#error "it was measured with AVX and AVX-512 alone"
#endif
enum {
    WIDTH = BYTES / sizeof(float),
    ROWS = 6,
    TILE_Q = 96, /* a multiple of ROWS */
    TILE_K = 64, /* a multiple of WIDTH */
};

typedef float vector __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(BYTES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* A tensor (B, H, N, D) with dense rows of D. */
typedef struct {
    float *at;
    int64_t image, head, row; /* strides, in numbers */
} Heads;

typedef struct {
    int64_t images, heads, queries, keys, dim, threads;
    float scale;
    Heads q, k, v, out, grad, grad_q, grad_k, grad_v;
    const float *lse; /* (B, H, N) */
} Call;

INLINE int64_t up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* -------- one product for all */

/* c[ROWS][n vectors] (+)= a b, with a[r][k] at a + r * down + k * along; rows of b and c are dim_b and dim_c apart. */
INLINE void rows_of_product(const int n, const int add, float *restrict c, int64_t dim_c, const float *restrict a,
                            int64_t down, int64_t along, const float *restrict b, int64_t dim_b, int64_t depth) {
    vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < n; v++) sum[r][v] = add ? *(vector *)(c + r * dim_c + v * WIDTH) : (vector){0};
    for (int64_t k = 0; k < depth; k++) {
        vector row[VECTORS];
        for (int v = 0; v < n; v++) row[v] = *(const vector *)(b + k * dim_b + v * WIDTH);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < n; v++) sum[r][v] += a[r * down + k * along] * row[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < n; v++) *(vector *)(c + r * dim_c + v * WIDTH) = sum[r][v];
}

/* c (rows, columns) (+)= a (rows, depth) b (depth, columns), rows rounded up to ROWS and columns to WIDTH. */
INLINE void product(const int add, float *c, int64_t dim_c, const float *a, int64_t down, int64_t along, const float *b,
                    int64_t dim_b, int64_t rows, int64_t columns, int64_t depth) {
    int64_t full = columns / (VECTORS * WIDTH) * VECTORS * WIDTH;
    for (int64_t j = 0; j < full; j += VECTORS * WIDTH)
        for (int64_t i = 0; i < rows; i += ROWS)
            rows_of_product(VECTORS, add, c + i * dim_c + j, dim_c, a + i * down, down, along, b + j, dim_b, depth);
    for (int64_t j = full; j < columns; j += WIDTH)
        for (int64_t i = 0; i < rows; i += ROWS)
            rows_of_product(1, add, c + i * dim_c + j, dim_c, a + i * down, down, along, b + j, dim_b, depth);
}

/* -------- exponential */

/* e^x for x <= 0 within 2 units of the last place: e^x = 2^n e^f, |f| <= ln(2) / 2, e^f by its Taylor polynomial. */
INLINE vector exponential(vector x) {
    const vector least = (vector){0} - 87;
    whole below = x < least; /* not of what is not a number, which stays so */
    x = (vector)(((whole)x & ~below) | ((whole)least & below));
    const float magic = 0x1.8p23f; /* a number so large that it has no digits behind the point */
    vector rounded = x * 1.44269504f + magic, n = rounded - magic;
    vector f = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts: the first product is exact */
    vector y = f / 5040 + 1.f / 720;
    const float coefficients[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 6; i++) y = y * f + coefficients[i];
    whole exponent = ((whole)rounded << 23) + 0x3f800000; /* the last digits of `rounded` are n */
    return y * (vector)exponent;
}

/* -------- an image and a head */

typedef struct {
    float *q, *grad, *grad_q;   /* (queries, dim), zeros behind the last query */
    float *delta;               /* (queries) */
    float *k, *k_down, *v_down; /* a tile of keys: (TILE_K, dim), and K' and V': (dim, TILE_K) */
    float *grad_k, *grad_v;     /* (TILE_K, dim) */
    float *p, *ds;              /* (TILE_Q, TILE_K) */
} Scratch;

INLINE float *row_of(const Heads *x, int64_t image, int64_t head, int64_t row) {
    return x->at + image * x->image + head * x->head + row * x->row;
}

/* Lay scratch memory out, or only count its numbers where `memory` is null. */
static int64_t lay_out(const Call *call, float *memory, Scratch *scratch) {
    int64_t dim = up(call->dim, WIDTH), queries = up(call->queries, ROWS), used = 0;
    const struct {
        float **part;
        int64_t numbers;
    } parts[] = {
        {&scratch->q, queries * dim},
        {&scratch->grad, queries * dim},
        {&scratch->grad_q, queries * dim},
        {&scratch->delta, queries},
        {&scratch->k, TILE_K * dim},
        {&scratch->k_down, dim * TILE_K},
        {&scratch->v_down, dim * TILE_K},
        {&scratch->grad_k, (TILE_K + ROWS) * dim}, /* TILE_K is no multiple of ROWS: some rows more */
        {&scratch->grad_v, (TILE_K + ROWS) * dim},
        {&scratch->p, TILE_Q * TILE_K + ROWS}, /* and their numbers, read as P' */
        {&scratch->ds, TILE_Q * TILE_K + ROWS},
    };
    for (int i = 0; i < (int)(sizeof(parts) / sizeof(*parts)); i++) {
        if (memory) *parts[i].part = memory + used;
        used += up(parts[i].numbers, 16);
    }
    return used;
}

static void take_queries(const Call *call, int64_t image, int64_t head, Scratch *to) {
    int64_t dim = up(call->dim, WIDTH), queries = up(call->queries, ROWS);
    memset(to->q, 0, queries * dim * sizeof(float));
    memset(to->grad, 0, queries * dim * sizeof(float));
    memset(to->grad_q, 0, queries * dim * sizeof(float));
    for (int64_t i = 0; i < call->queries; i++) {
        const float *out = row_of(&call->out, image, head, i), *grad = row_of(&call->grad, image, head, i);
        memcpy(to->q + i * dim, row_of(&call->q, image, head, i), call->dim * sizeof(float));
        memcpy(to->grad + i * dim, grad, call->dim * sizeof(float));
        float sum = 0;
        for (int64_t d = 0; d < call->dim; d++) sum += out[d] * grad[d];
        to->delta[i] = sum;
    }
}

static void take_keys(const Call *call, int64_t image, int64_t head, int64_t first, int64_t keys, Scratch *to) {
    int64_t dim = up(call->dim, WIDTH);
    memset(to->k, 0, TILE_K * dim * sizeof(float));
    memset(to->k_down, 0, dim * TILE_K * sizeof(float));
    memset(to->v_down, 0, dim * TILE_K * sizeof(float));
    for (int64_t j = 0; j < keys; j++) {
        const float *k = row_of(&call->k, image, head, first + j), *v = row_of(&call->v, image, head, first + j);
        memcpy(to->k + j * dim, k, call->dim * sizeof(float));
        for (int64_t d = 0; d < call->dim; d++) {
            to->k_down[d * TILE_K + j] = k[d];
            to->v_down[d * TILE_K + j] = v[d];
        }
    }
}

/* p holds Q K' and ds holds dP; make P and dS of them. */
static void soften(const Call *call, int64_t rows, int64_t columns, const float *lse, const float *delta, float *p,
                   float *ds) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += WIDTH) {
            vector *at_p = (vector *)(p + i * TILE_K + j), *at_ds = (vector *)(ds + i * TILE_K + j);
            vector share = exponential(*at_p * call->scale - lse[i]);
            *at_p = share;
            *at_ds = call->scale * share * (*at_ds - delta[i]);
        }
    for (int64_t i = rows; i < up(rows, ROWS); i++) {
        memset(p + i * TILE_K, 0, TILE_K * sizeof(float));
        memset(ds + i * TILE_K, 0, TILE_K * sizeof(float));
    }
}

static void one_head(const Call *call, int64_t image, int64_t head, Scratch *s) {
    int64_t dim = up(call->dim, WIDTH);
    const float *lse = call->lse + (image * call->heads + head) * call->queries;
    take_queries(call, image, head, s);
    for (int64_t j = 0; j < call->keys; j += TILE_K) {
        int64_t keys = call->keys - j < TILE_K ? call->keys - j : TILE_K;
        take_keys(call, image, head, j, keys, s);
        memset(s->grad_k, 0, (TILE_K + ROWS) * dim * sizeof(float));
        memset(s->grad_v, 0, (TILE_K + ROWS) * dim * sizeof(float));
        for (int64_t i = 0; i < call->queries; i += TILE_Q) {
            int64_t rows = call->queries - i < TILE_Q ? call->queries - i : TILE_Q;
            const float *q = s->q + i * dim, *grad = s->grad + i * dim;
            product(0, s->p, TILE_K, q, dim, 1, s->k_down, TILE_K, rows, keys, dim);
            product(0, s->ds, TILE_K, grad, dim, 1, s->v_down, TILE_K, rows, keys, dim);
            soften(call, rows, keys, lse + i, s->delta + i, s->p, s->ds);
            product(1, s->grad_v, dim, s->p, 1, TILE_K, grad, dim, keys, dim, rows);
            product(1, s->grad_k, dim, s->ds, 1, TILE_K, q, dim, keys, dim, rows);
            product(1, s->grad_q + i * dim, dim, s->ds, TILE_K, 1, s->k, dim, rows, dim, keys);
        }
        for (int64_t y = 0; y < keys; y++) {
            memcpy(row_of(&call->grad_k, image, head, j + y), s->grad_k + y * dim, call->dim * sizeof(float));
            memcpy(row_of(&call->grad_v, image, head, j + y), s->grad_v + y * dim, call->dim * sizeof(float));
        }
    }
    for (int64_t i = 0; i < call->queries; i++)
        memcpy(row_of(&call->grad_q, image, head, i), s->grad_q + i * dim, call->dim * sizeof(float));
}

/* -------- calls */

/* Numbers of scratch memory that a thread needs. */
int64_t scratch(const Call *call) {
    Scratch unused;
    return lay_out(call, 0, &unused);
}

void backward(const Call *call, float *memory) {
    int64_t units = call->images * call->heads, each = scratch(call);
#pragma omp parallel for num_threads((int)call->threads) schedule(static)
    for (int64_t thread = 0; thread < call->threads; thread++) {
        Scratch s;
        lay_out(call, memory + thread * each, &s);
        for (int64_t unit = thread; unit < units; unit += call->threads)
            one_head(call, unit / call->heads, unit % call->heads, &s);
    }
}
