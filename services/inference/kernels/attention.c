/*
 * Attention of one new token per sequence over paged keys and values, float32, read where they lie:
 * softmax(scaling * q k^T) v, within the sequence's length and window.
 */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

typedef int32_t lanes_of_ints __attribute__((vector_size(4 * LANES)));

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

/* e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2 and a polynomial for e^r; undefined stays undefined. */
INLINE lanes exp_of_negative(lanes x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    lanes_of_ints too_small = x < (lanes){0} - 87.0f;
    lanes n = (x * 1.44269504f + magic) - magic;
    lanes r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    lanes p = (lanes){0} + 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 5.00000000e-1f;
    p = p * r * r + r + 1.0f;
    lanes_of_ints exponent = (__builtin_convertvector(n, lanes_of_ints) + 127) << 23;
    return (lanes)((lanes_of_ints)(p * (lanes)exponent) & ~too_small);
}

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

/* `head_dim` is a multiple of LANES; `scores` holds per thread `stride` floats, the longest length rounded up. */
void lorafleet_decode_attention(const attention *a, float *scores, int64_t stride, int64_t threads) {
    int64_t tasks = a->n * a->kv_heads;
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 2)
    for (int64_t task = 0; task < tasks; task++) {
#ifdef _OPENMP
        int64_t thread = omp_get_thread_num();
#else
        int64_t thread = 0;
#endif
        attend(a, task / a->kv_heads, task % a->kv_heads, scores + thread * stride);
    }
}
