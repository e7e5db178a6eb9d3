/* Attention of one step: see attention.h. */
#include "attention.h"

/* `head_dim` is a multiple of LANES; `scores` holds per thread `stride` floats, the longest length rounded up. */
void lorafleet_decode_attention(const attention *a, float *scores, int64_t stride, int64_t threads) {
    int64_t tasks = a->n * a->kv_heads;
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 2)
    for (int64_t task = 0; task < tasks; task++) {
        attend(a, task / a->kv_heads, task % a->kv_heads, scores + own_thread() * stride);
    }
}
