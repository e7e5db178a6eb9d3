/*
 * Linear layers of a few rows, each row with its own adapter: y = gain (W x + bias) + B (A x) + shift, float32.
 *
 * The projections of one call share x. Weights are read once, where they lie. A row's result is the same bits
 * whatever the other rows are and however many threads work: every sum is taken in one fixed order.
 */
#ifndef LORAFLEET_LINEAR_H
#define LORAFLEET_LINEAR_H

#include "lanes.h"

/* Output features of a tile, and blocks of LANES rows that one pass over the weights serves. */
#define TILE 8
#define MAX_BLOCKS 3

/* Rows of one adapter, and columns of y, that change together. */
#define EXPAND_ROWS (LANES == 16 ? 8 : 4)
#define EXPAND_COLUMNS (8 * LANES)

/* Floats of adapters that are asked for ahead of their use. */
#define FETCH_FLOATS (64 << 10)

/* Most projections of one call. */
#define MAX_PROJECTIONS 3

/* A projection of the base. `weight` may be null: then the adapters change what `y` holds. */
typedef struct {
    const float *weight; /* [out, in] */
    const float *bias;   /* [out], or null */
    int64_t out;
    int64_t module; /* its row in the adapters' tables */
} projection;

/* Projections of the same x. */
typedef struct {
    int64_t in;
    int64_t count;
    projection projections[MAX_PROJECTIONS];
} layer;

/* An adapter's update of one module; rank 0 where it leaves the module alone. */
typedef struct {
    const float *a;     /* [rank, in] */
    const float *b;     /* [rank, out]: B transposed, scaled */
    const float *gain;  /* [out], or null */
    const float *shift; /* [out], or null */
    int64_t rank;
} update;

/* Rows `start` to `end` use the adapter whose updates are at `table`. */
typedef struct {
    const update *table;
    int64_t start;
    int64_t end;
} segment;

/* What the calls of one step have in common. */
typedef struct {
    const segment *segments;
    int64_t count;
    int64_t threads;
    float *packed; /* the largest `in` times the rows, rounded up to LANES; aligned to the lanes */
    float *low;    /* the largest rank times MAX_PROJECTIONS times the rows */
} step;

typedef struct {
    const layer *layer;
    const step *step;
    const float *x; /* [rows, in] */
    int64_t rows;
    float *y[MAX_PROJECTIONS]; /* each [rows, out] */
} job;

/* acc[f][block] = rows of `block` dotted with weight row f. Fetches the rows `ahead` of them meanwhile. */
INLINE void tile(const int blocks, const float *const weight[TILE], int64_t in, int64_t ahead,
                 const float *packed, lanes acc[TILE][MAX_BLOCKS]) {
    const float *w[TILE];
    for (int f = 0; f < TILE; f++) {
        w[f] = weight[f];
        for (int block = 0; block < blocks; block++) acc[f][block] = (lanes){0};
    }
    int64_t k = 0;
    for (; k + 16 <= in; k += 16) {
#pragma GCC unroll 8
        for (int f = 0; f < TILE; f++) __builtin_prefetch(w[f] + ahead, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            lanes x[MAX_BLOCKS];
#pragma GCC unroll 3
            for (int block = 0; block < blocks; block++)
                x[block] = *(const lanes *)(packed + (i * blocks + block) * LANES);
#pragma GCC unroll 8
            for (int f = 0; f < TILE; f++)
#pragma GCC unroll 3
                for (int block = 0; block < blocks; block++) acc[f][block] += x[block] * w[f][i];
        }
        packed += 16 * blocks * LANES;
        for (int f = 0; f < TILE; f++) w[f] += 16;
    }
    for (; k < in; k++, packed += blocks * LANES)
        for (int f = 0; f < TILE; f++) {
            for (int block = 0; block < blocks; block++)
                acc[f][block] += *(const lanes *)(packed + block * LANES) * *w[f];
            w[f]++;
        }
}

/* y[rows, first..last) = W x + bias, for at most MAX_BLOCKS blocks of rows. */
INLINE void base_columns(const int blocks, const projection *p, int64_t in, const float *packed, float *y,
                         int64_t rows, int64_t first, int64_t last) {
    for (int64_t column = first; column < last; column += TILE) {
        const float *weight[TILE];
        lanes acc[TILE][MAX_BLOCKS];
        for (int f = 0; f < TILE; f++) weight[f] = p->weight + least(column + f, last - 1) * in;
        tile(blocks, weight, in, TILE * in, packed, acc);
        int64_t width = least(TILE, last - column);
        for (int64_t row = 0; row < rows; row++) {
            float *to = y + row * p->out + column;
            for (int64_t f = 0; f < width; f++)
                to[f] = ((const float *)acc[f])[row] + (p->bias ? p->bias[column + f] : 0.0f);
        }
    }
}

static void base_columns_1(const projection *p, int64_t in, const float *packed, float *y, int64_t rows,
                           int64_t first, int64_t last) {
    base_columns(1, p, in, packed, y, rows, first, last);
}

static void base_columns_2(const projection *p, int64_t in, const float *packed, float *y, int64_t rows,
                           int64_t first, int64_t last) {
    base_columns(2, p, in, packed, y, rows, first, last);
}

static void base_columns_3(const projection *p, int64_t in, const float *packed, float *y, int64_t rows,
                           int64_t first, int64_t last) {
    base_columns(3, p, in, packed, y, rows, first, last);
}

/* packed[k][row] = x[row][k] for k in first..last, rows beyond the last as zeros. */
static void pack(const float *x, int64_t in, int64_t rows, int64_t width, int64_t first, int64_t last,
                 float *packed) {
    for (int64_t k = first; k < last; k++) {
        for (int64_t row = 0; row < rows; row++) packed[k * width + row] = x[row * in + k];
        for (int64_t row = rows; row < width; row++) packed[k * width + row] = 0.0f;
    }
}

/* low[row * stride + r] = a[r] . x[row], for `count` ranks and `rows` rows. */
INLINE void dots(const int count, const int rows, const float *a, const float *x, int64_t in, float *low,
                 int64_t stride) {
    lanes acc[4][4];
    float tail[4][4];
    int64_t whole = in - in % LANES;
    for (int r = 0; r < count; r++)
        for (int row = 0; row < rows; row++) acc[r][row] = (lanes){0};
    for (int64_t k = 0; k < whole; k += LANES) {
        lanes at[4];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) at[row] = load(x + row * in + k);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            lanes weight = load(a + r * in + k);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) acc[r][row] += weight * at[row];
        }
    }
    for (int r = 0; r < count; r++)
        for (int row = 0; row < rows; row++) {
            tail[r][row] = 0.0f;
            for (int64_t k = whole; k < in; k++) tail[r][row] += a[r * in + k] * x[row * in + k];
            low[row * stride + r] = total(acc[r][row]) + tail[r][row];
        }
}

static void shrink(const float *a, int64_t first, int64_t last, const float *x, int64_t in, int64_t rows,
                   float *low, int64_t stride) {
    int64_t r = first;
    for (; r + 4 <= last; r += 4) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4)
            dots(4, 4, a + r * in, x + row * in, in, low + row * stride + r, stride);
        for (; row < rows; row++) dots(4, 1, a + r * in, x + row * in, in, low + row * stride + r, stride);
    }
    for (; r < last; r++)
        for (int64_t row = 0; row < rows; row++)
            dots(1, 1, a + r * in, x + row * in, in, low + row * stride + r, stride);
}

/* y[rows, vectors * LANES) += low b; `b` and `y` are at the block's first column. */
INLINE void expand_block(const int rows, const int vectors, const float *b, int64_t rank, const float *low,
                         int64_t out, float *y) {
    lanes acc[EXPAND_ROWS][8];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) acc[row][v] = load(y + row * out + v * LANES);
    for (int64_t r = 0; r < rank; r++, b += out)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            lanes weight = load(b + v * LANES);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) acc[row][v] += weight * low[row * rank + r];
        }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(y + row * out + v * LANES, acc[row][v]);
}

/* y[rows, count) += low b, `vectors` at a time. */
INLINE void expand_rows(const int rows, const int vectors, const float *b, int64_t rank, const float *low,
                        int64_t out, float *y, int64_t count) {
    int64_t n = 0;
    for (; n + vectors * LANES <= count; n += vectors * LANES)
        expand_block(rows, vectors, b + n, rank, low, out, y + n);
    for (; n + LANES <= count; n += LANES) expand_block(rows, 1, b + n, rank, low, out, y + n);
    for (; n < count; n++)
        for (int row = 0; row < rows; row++)
            for (int64_t r = 0; r < rank; r++) y[row * out + n] += b[r * out + n] * low[row * rank + r];
}

/* y[rows, first..last) = gain y + low b + shift. b is taken by pieces that stay in the first cache for all rows. */
static void expand(const update *u, const float *low, int64_t rows, int64_t out, float *y, int64_t first,
                   int64_t last) {
    if (u->gain)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t n = first; n < last; n++) y[row * out + n] *= u->gain[n];
    int64_t rank = u->rank;
    for (int64_t n = first; n < last && rank; n += EXPAND_COLUMNS) {
        int64_t count = least(EXPAND_COLUMNS, last - n), row = 0;
        const float *b = u->b + n;
        for (; row + EXPAND_ROWS <= rows; row += EXPAND_ROWS)
            expand_rows(EXPAND_ROWS, 2, b, rank, low + row * rank, out, y + row * out + n, count);
        for (; row + EXPAND_ROWS / 2 <= rows; row += EXPAND_ROWS / 2)
            expand_rows(EXPAND_ROWS / 2, 4, b, rank, low + row * rank, out, y + row * out + n, count);
        for (; row < rows; row++)
            expand_rows(1, 8, b, rank, low + row * rank, out, y + row * out + n, count);
    }
    if (u->shift)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t n = first; n < last; n++) y[row * out + n] += u->shift[n];
}

/* Ask for memory that is read soon, as far as the second cache has room for it beside all else. */
INLINE int64_t fetch(const float *from, int64_t count, int64_t budget) {
    for (int64_t i = 0; i < least(count, budget); i += 16) __builtin_prefetch(from + i, 0, 2);
    return budget - count;
}

/* The rows of one pass over the weights, from `row` on. */
INLINE int64_t rows_of_pass(const job *j, int64_t row) { return least(j->rows - row, MAX_BLOCKS * LANES); }

INLINE int64_t blocks_for(int64_t rows) { return (rows + LANES - 1) / LANES; }

/* This thread's share of packing x. */
static void pack_share(const job *j, int64_t thread, int64_t threads) {
    int64_t in = j->layer->in;
    int64_t first = share(in, 16, thread, threads), last = share(in, 16, thread + 1, threads);
    float *packed = j->step->packed;
    for (int64_t row = 0; row < j->rows; row += MAX_BLOCKS * LANES) {
        int64_t rows = rows_of_pass(j, row), width = blocks_for(rows) * LANES;
        pack(j->x + row * in, in, rows, width, first, last, packed);
        packed += width * in;
    }
}

/* This thread's share of A x, an even part of all ranks of all segments and projections; or ask for its A. */
INLINE void shrink_share(const job *j, const int fetching, int64_t thread, int64_t threads) {
    const layer *l = j->layer;
    int64_t ranks = 0;
    for (int64_t s = 0; s < j->step->count; s++)
        for (int64_t p = 0; p < l->count; p++) ranks += j->step->segments[s].table[l->projections[p].module].rank;
    int64_t first = share(ranks, 4, thread, threads), last = share(ranks, 4, thread + 1, threads), at = 0;
    float *low = j->step->low;
    int64_t budget = FETCH_FLOATS;
    for (int64_t s = 0; s < j->step->count; s++) {
        const segment *g = &j->step->segments[s];
        for (int64_t p = 0; p < l->count; p++) {
            const update *u = &g->table[l->projections[p].module];
            int64_t from = most(first - at, 0), to = least(last - at, u->rank);
            if (from < to && fetching)
                budget = fetch(u->a + from * l->in, (to - from) * l->in, budget);
            else if (from < to)
                shrink(u->a, from, to, j->x + g->start * l->in, l->in, g->end - g->start, low, u->rank);
            at += u->rank;
            low += u->rank * (g->end - g->start);
        }
    }
}

/* This thread's columns of W x + bias. */
static void base_share(const job *j, int64_t thread, int64_t threads) {
    for (int64_t i = 0; i < j->layer->count; i++) {
        const projection *p = &j->layer->projections[i];
        int64_t first = share(p->out, 16, thread, threads), last = share(p->out, 16, thread + 1, threads);
        if (!p->weight || first == last) continue;
        const float *packed = j->step->packed;
        for (int64_t row = 0; row < j->rows; row += MAX_BLOCKS * LANES) {
            int64_t rows = rows_of_pass(j, row), blocks = blocks_for(rows);
            float *y = j->y[i] + row * p->out;
            if (blocks == 1) base_columns_1(p, j->layer->in, packed, y, rows, first, last);
            if (blocks == 2) base_columns_2(p, j->layer->in, packed, y, rows, first, last);
            if (blocks == 3) base_columns_3(p, j->layer->in, packed, y, rows, first, last);
            packed += blocks * LANES * j->layer->in;
        }
    }
}

/* This thread's columns of the adapters' part. */
static void expand_share(const job *j, int64_t thread, int64_t threads) {
    const float *low = j->step->low;
    for (int64_t s = 0; s < j->step->count; s++) {
        const segment *g = &j->step->segments[s];
        for (int64_t i = 0; i < j->layer->count; i++) {
            const projection *p = &j->layer->projections[i];
            const update *u = &g->table[p->module];
            int64_t first = share(p->out, 16, thread, threads), last = share(p->out, 16, thread + 1, threads);
            if (first < last)
                expand(u, low, g->end - g->start, p->out, j->y[i] + g->start * p->out, first, last);
            low += u->rank * (g->end - g->start);
        }
    }
}

/* Ask for this thread's columns of every B. */
static void fetch_expand(const job *j, int64_t thread, int64_t threads) {
    int64_t budget = FETCH_FLOATS;
    for (int64_t s = 0; s < j->step->count && budget > 0; s++)
        for (int64_t i = 0; i < j->layer->count; i++) {
            const projection *p = &j->layer->projections[i];
            const update *u = &j->step->segments[s].table[p->module];
            int64_t first = share(p->out, 16, thread, threads), last = share(p->out, 16, thread + 1, threads);
            for (int64_t r = 0; r < u->rank && budget > 0; r++)
                budget = fetch(u->b + r * p->out + first, last - first, budget);
        }
}

/* The two parts of a job for one thread of a team; a barrier must stand between them. */
INLINE void begin_job(const job *j, int64_t thread, int64_t threads) {
    shrink_share(j, 1, thread, threads);
    if (j->layer->projections[0].weight) pack_share(j, thread, threads);
    shrink_share(j, 0, thread, threads);
    fetch_expand(j, thread, threads);
}

INLINE void end_job(const job *j, int64_t thread, int64_t threads) {
    base_share(j, thread, threads);
    expand_share(j, thread, threads);
}

#endif
