/* Vectors as wide as the machine's, in the compiler's own vector types: one source for every instruction set. */
#ifndef LORAFLEET_LANES_H
#define LORAFLEET_LANES_H

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

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

typedef int32_t lanes_of_ints __attribute__((vector_size(4 * LANES)));

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

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* The calling thread's number in its team, and the team's size. */
INLINE int64_t own_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE int64_t all_threads(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* Where the share of `thread` in `amount` begins, in multiples of `unit`. */
INLINE int64_t share(int64_t amount, int64_t unit, int64_t thread, int64_t threads) {
    int64_t units = (amount + unit - 1) / unit;
    return least(amount, units * thread / threads * unit);
}

#endif
