/* Linear layers of one step: see linear.h. */
#include "linear.h"

/* Compute every projection of `l` for x [rows, in]; y0 to y2 [rows, out] belong to its projections in turn. */
void lorafleet_linear(const layer *l, const step *s, const float *x, int64_t rows, float *y0, float *y1,
                      float *y2) {
    job j = {l, s, x, rows, {y0, y1, y2}};
#pragma omp parallel num_threads((int)s->threads)
    {
        int64_t thread = own_thread(), threads = all_threads();
        begin_job(&j, thread, threads);
#pragma omp barrier
        end_job(&j, thread, threads);
    }
}

int64_t lorafleet_lanes(void) { return LANES; }

int64_t lorafleet_rows_per_pass(void) { return MAX_BLOCKS * LANES; }
