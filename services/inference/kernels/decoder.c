/*
 * One decoder layer of the Llama kind for sequences that each add one token, in one call:
 *
 *   h = x + o(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))
 *   y = h + down(silu(gate(norm(h))) * up(norm(h)))
 *
 * with the rows' adapters in every linear layer, and new keys and values written to their pages.
 */
#include "attention.h"
#include "linear.h"

/* Root mean square normalisation; `weight` may be null where the model has none. */
typedef struct {
    const float *weight;
    float epsilon;
} norm;

/* A layer as it was loaded. All sizes are multiples of LANES. */
typedef struct {
    layer qkv;
    layer o;
    layer gate_up;
    layer down;
    norm input;
    norm post_attention;
    norm query; /* of each head, before the rotation */
    norm key;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t window; /* keys that a query sees; 0 for all */
    float scaling;
} decoder_layer;

/* Memory for what passes between the layer's parts, each [rows, ...]. */
typedef struct {
    float *normed;   /* hidden */
    float *query;    /* heads * head_dim */
    float *key;      /* kv_heads * head_dim */
    float *value;    /* kv_heads * head_dim */
    float *attended; /* heads * head_dim */
    float *middle;   /* hidden */
    float *gate;     /* intermediate */
    float *up;       /* intermediate */
    float *scores;   /* per thread `stride` floats, the longest length rounded up to LANES */
    int64_t stride;
} workspace;

/* What the layers of one step have in common. */
typedef struct {
    const step *linear;
    const attention *groups; /* rows, tables, lengths and sizes of sequences; the rest is filled in by layer */
    int64_t num_groups;
    const float *cos; /* [rows, head_dim] */
    const float *sin;
    const int64_t *slots; /* [rows] where the new keys and values go */
    workspace work;
} decode_step;

/* to = weight * from / sqrt(mean(from^2) + epsilon) for one row. */
static void normalise(const norm *n, const float *from, int64_t width, float *to) {
    lanes squares = {0};
    for (int64_t i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
    float scale = 1.0f / __builtin_sqrtf(total(squares) / (float)width + n->epsilon);
    for (int64_t i = 0; i < width; i += LANES) store(to + i, load(n->weight + i) * (load(from + i) * scale));
}

/* Normalise, where the model does, and rotate every head of one row in place; the halves of a head are pairs. */
static void rotate(const norm *n, float *row, int64_t heads, int64_t dim, const float *cos, const float *sin) {
    int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, row += dim) {
        if (n->weight) normalise(n, row, dim, row);
        for (int64_t i = 0; i < half; i++) {
            float first = row[i], second = row[half + i];
            row[i] = first * cos[i] - second * sin[i];
            row[half + i] = second * cos[half + i] + first * sin[half + i];
        }
    }
}

/* gate = gate / (1 + e^-gate) * up. */
static void gated(float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        lanes g = load(gate + i);
        lanes_of_ints negative = g < (lanes){0};
        lanes e = exp_of_negative((lanes)((lanes_of_ints)g | INT32_MIN));
        lanes_of_ints one_or_e = ((lanes_of_ints)e & negative) | ((lanes_of_ints)((lanes){0} + 1.0f) & ~negative);
        store(gate + i, g * ((lanes)one_or_e / (e + 1.0f)) * load(up + i));
    }
}

static void copy(const float *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

/* Rotate one row's query and key, and write key and value to their page. */
static void place(const decoder_layer *d, const decode_step *s, int64_t row, float *keys, float *values) {
    const float *cos = s->cos + row * d->head_dim, *sin = s->sin + row * d->head_dim;
    int64_t width = d->kv_heads * d->head_dim;
    float *key = s->work.key + row * width;
    rotate(&d->query, s->work.query + row * d->heads * d->head_dim, d->heads, d->head_dim, cos, sin);
    rotate(&d->key, key, d->kv_heads, d->head_dim, cos, sin);
    copy(key, keys + s->slots[row] * width, width);
    copy(s->work.value + row * width, values + s->slots[row] * width, width);
}

/* This thread's columns: to += from. */
static void add_share(const float *from, float *to, int64_t rows, int64_t width, int64_t thread,
                      int64_t threads) {
    int64_t first = share(width, 16, thread, threads), last = share(width, 16, thread + 1, threads);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * width + first; i < row * width + last; i++) to[i] += from[i];
}

/* This thread's rows of the attention of every group: pairs of a sequence and a KV head, in turn. */
static void attend_share(const decoder_layer *d, const decode_step *s, const float *keys, const float *values) {
    const workspace *w = &s->work;
    for (int64_t g = 0; g < s->num_groups; g++) {
        attention a = s->groups[g];
        a.query = w->query;
        a.keys = keys;
        a.values = values;
        a.output = w->attended;
        a.token_stride = d->heads * d->head_dim;
        a.head_stride = d->head_dim;
        a.heads = d->heads;
        a.kv_heads = d->kv_heads;
        a.head_dim = d->head_dim;
        a.window = d->window;
        a.scaling = d->scaling;
        int64_t tasks = a.n * a.kv_heads;
#pragma omp for schedule(dynamic, 2)
        for (int64_t task = 0; task < tasks; task++)
            attend(&a, task / a.kv_heads, task % a.kv_heads, w->scores + own_thread() * w->stride);
    }
}

/* y [rows, hidden] from x [rows, hidden]; `keys` and `values` are the layer's pages. */
void lorafleet_decoder_layer(const decoder_layer *d, const decode_step *s, const float *x, int64_t rows,
                             float *keys, float *values, float *y) {
    const workspace *w = &s->work;
    int64_t hidden = d->qkv.in, intermediate = d->down.in;
    job qkv = {&d->qkv, s->linear, w->normed, rows, {w->query, w->key, w->value}};
    job o = {&d->o, s->linear, w->attended, rows, {w->middle}};
    job gate_up = {&d->gate_up, s->linear, w->normed, rows, {w->gate, w->up}};
    job down = {&d->down, s->linear, w->gate, rows, {y}};
#pragma omp parallel num_threads((int)s->linear->threads)
    {
        int64_t thread = own_thread(), threads = all_threads();
        int64_t first = share(rows, 1, thread, threads), last = share(rows, 1, thread + 1, threads);
        for (int64_t row = first; row < last; row++)
            normalise(&d->input, x + row * hidden, hidden, w->normed + row * hidden);
#pragma omp barrier
        begin_job(&qkv, thread, threads);
#pragma omp barrier
        end_job(&qkv, thread, threads);
#pragma omp barrier
        for (int64_t row = first; row < last; row++) place(d, s, row, keys, values);
#pragma omp barrier
        attend_share(d, s, keys, values);
        begin_job(&o, thread, threads);
#pragma omp barrier
        end_job(&o, thread, threads);
        add_share(x, w->middle, rows, hidden, thread, threads);
#pragma omp barrier
        for (int64_t row = first; row < last; row++)
            normalise(&d->post_attention, w->middle + row * hidden, hidden, w->normed + row * hidden);
#pragma omp barrier
        begin_job(&gate_up, thread, threads);
#pragma omp barrier
        end_job(&gate_up, thread, threads);
        int64_t from = share(intermediate, 16, thread, threads), to = share(intermediate, 16, thread + 1, threads);
        for (int64_t row = 0; row < rows; row++)
            gated(w->gate + row * intermediate + from, w->up + row * intermediate + from, to - from);
#pragma omp barrier
        begin_job(&down, thread, threads);
#pragma omp barrier
        end_job(&down, thread, threads);
        add_share(w->middle, y, rows, hidden, thread, threads);
    }
}
