/*
 * Attention of one new token per sequence over paged keys and values, float32, read where they lie:
 * softmax(scaling * q k^T) v, within the sequence's length and window.
 */
#ifndef LORAFLEET_ATTENTION_H
#define LORAFLEET_ATTENTION_H

#include "lanes.h"

/* Lanes of one value vector that are summed at once. */
#define CHUNK 4

typedef struct {
    const float *query; /* token and head strides in `query_strides`, the head's elements adjoining */
    const float *keys;  /* [blocks, block_size, kv_heads, head_dim] */
    const float *values;
    float *output;           /* [tokens, heads, head_dim] */
    const int64_t *rows;     /* [n] position of each sequence's token in the flat batch */
    const int64_t *tables;   /* [n, width] */
    const int64_t *lengths;  /* [n] */
    int64_t n;
    int64_t width;
    int64_t token_stride;
    int64_t head_stride;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t window; /* keys that a query sees; 0 for all */
    float scaling;
} attention;

/* A run of tokens whose pages adjoin: those of one block. */
typedef struct {
    const float *from; /* of the first token, for one KV head */
    int64_t count;
} stretch;

INLINE stretch stretch_at(const float *pages, const attention *a, const int64_t *table, int64_t head, int64_t at,
                          int64_t end) {
    int64_t offset = at % a->block_size;
    int64_t slot = table[at / a->block_size] * a->block_size + offset;
    return (stretch){pages + (slot * a->kv_heads + head) * a->head_dim, least(a->block_size - offset, end - at)};
}

/* scores[at - first] = scaling * q . k[at], padded with -infinity to whole lanes. */
static void score(const attention *a, const float *query, const int64_t *table, int64_t head, int64_t first,
                  int64_t end, float *scores) {
    const int64_t step = a->kv_heads * a->head_dim;
    int64_t at = first;
    while (at < end) {
        stretch keys = stretch_at(a->keys, a, table, head, at, end);
        for (int64_t i = 0; i < keys.count; i++, at++) {
            const float *key = keys.from + i * step;
            lanes sum = {0};
            for (int64_t d = 0; d < a->head_dim; d += LANES) sum += load(query + d) * load(key + d);
            scores[at - first] = total(sum) * a->scaling;
        }
    }
    for (at = end - first; at % LANES; at++) scores[at] = -__builtin_inff();
}

/* Replace scores by e^(score - largest) and return one over their sum. */
static float soften(float *scores, int64_t count) {
    lanes largest = load(scores);
    for (int64_t at = LANES; at < count; at += LANES) {
        lanes value = load(scores + at);
        lanes_of_ints above = value > largest;
        largest = (lanes)(((lanes_of_ints)value & above) | ((lanes_of_ints)largest & ~above));
    }
    float top = largest[0];
    for (int lane = 1; lane < LANES; lane++) top = largest[lane] > top ? largest[lane] : top;
    lanes sum = {0};
    for (int64_t at = 0; at < count; at += LANES) {
        lanes value = exp_of_negative(load(scores + at) - top);
        store(scores + at, value);
        sum += value;
    }
    return 1.0f / total(sum);
}

/* output[dim..] = scale * sum of scores v, for `chunk` lanes. */
INLINE void weigh(const int chunk, const attention *a, const float *scores, float scale, const int64_t *table,
                  int64_t head, int64_t first, int64_t end, int64_t dim, float *output) {
    const int64_t step = a->kv_heads * a->head_dim;
    lanes sum[CHUNK];
    for (int c = 0; c < chunk; c++) sum[c] = (lanes){0};
    int64_t at = first;
    while (at < end) {
        stretch values = stretch_at(a->values, a, table, head, at, end);
        for (int64_t i = 0; i < values.count; i++, at++) {
            const float *value = values.from + i * step + dim;
#pragma GCC unroll 4
            for (int c = 0; c < chunk; c++) sum[c] += load(value + c * LANES) * scores[at - first];
        }
    }
    for (int c = 0; c < chunk; c++) store(output + dim + c * LANES, sum[c] * scale);
}

/* All query heads that share KV head `head`, for sequence `i`. */
static void attend(const attention *a, int64_t i, int64_t head, float *scores) {
    const int64_t *table = a->tables + i * a->width;
    int64_t length = a->lengths[i], group = a->heads / a->kv_heads;
    int64_t first = a->window ? most(0, length - a->window) : 0;
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
        const float *query = a->query + a->rows[i] * a->token_stride + h * a->head_stride;
        float *output = a->output + (a->rows[i] * a->heads + h) * a->head_dim;
        score(a, query, table, head, first, length, scores);
        float scale = soften(scores, length - first);
        int64_t dim = 0;
        for (; dim + CHUNK * LANES <= a->head_dim; dim += CHUNK * LANES)
            weigh(CHUNK, a, scores, scale, table, head, first, length, dim, output);
        for (; dim < a->head_dim; dim += LANES)
            weigh(1, a, scores, scale, table, head, first, length, dim, output);
    }
}

#endif
