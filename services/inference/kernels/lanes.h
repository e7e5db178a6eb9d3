/* Vectors as wide as the machine's, in the compiler's own vector types: one source for every instruction set. */
#ifndef LORAFLEET_LANES_H
#define LORAFLEET_LANES_H

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float lanes_at_any_address __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const float *from) { return *(const lanes_at_any_address *)from; }

INLINE void store(float *to, lanes value) { *(lanes_at_any_address *)to = value; }

/* The sum of all lanes, always in the same order: halves are added until one pair is left. */
typedef float four_lanes __attribute__((vector_size(16)));
typedef float eight_lanes __attribute__((vector_size(32)));

INLINE float total_of_four(four_lanes value) { return (value[0] + value[2]) + (value[1] + value[3]); }

INLINE float total_of_eight(eight_lanes value) {
    union { eight_lanes whole; four_lanes half[2]; } parts = {value};
    return total_of_four(parts.half[0] + parts.half[1]);
}

#if LANES == 16
INLINE float total(lanes value) {
    union { lanes whole; eight_lanes half[2]; } parts = {value};
    return total_of_eight(parts.half[0] + parts.half[1]);
}
#elif LANES == 8
INLINE float total(lanes value) { return total_of_eight(value); }
#else
INLINE float total(lanes value) { return total_of_four(value); }
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
