/* Vectors of 16 floats: the compiler's own arithmetic, and the few operations that it has no operator for. Where the processor's
 * registers are narrower, compilers split what is written here. */
#ifndef KIVNUN_VECTORS_H
#define KIVNUN_VECTORS_H

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WHOLE_VECTORS
#endif

#include "scalars.h"

enum { LANES = 16 };
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(64), aligned(4), may_alias));

static inline vec vec_at(const float *x) { return *(const vec *)x; }
static inline void put_vec(float *to, vec x) { *(vec *)to = x; }
static inline vec vec_of(float x) { return x - (vec){0}; }

/* The larger of each two lanes; b where one is NaN. */
static inline vec larger(vec a, vec b) {
#ifdef WHOLE_VECTORS
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
#endif
}

static inline uint32_t lanes_below(int64_t n) { return n <= 0 ? 0 : n >= LANES ? 0xffffu : (1u << n) - 1; }

/* x in lanes low <= i < high, `otherwise` in the others. */
static inline vec within(vec x, int64_t low, int64_t high, float otherwise) {
#ifdef WHOLE_VECTORS
  return (vec)_mm512_mask_blend_ps((__mmask16)(lanes_below(high) & ~lanes_below(low)), _mm512_set1_ps(otherwise), (__m512)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = i >= low && i < high ? x[i] : otherwise;
  return x;
#endif
}

static inline float sum_of(vec x) {
#ifdef WHOLE_VECTORS
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0.0f;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
#endif
}

static inline float largest_of(vec x) {
#ifdef WHOLE_VECTORS
  return _mm512_reduce_max_ps((__m512)x);
#else
  float largest = x[0];
  for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

/* Turns a square of 16 vectors over its diagonal. */
static inline void transpose(const float *from, int64_t from_row, float *to, int64_t to_row) {
#ifdef WHOLE_VECTORS
  __m512 x[LANES];
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_ps(from + i * from_row);
  /* Squares of `half` lanes on either side of the diagonal change places, in ever larger squares. */
#pragma GCC unroll 4
  for (int half = 1; half < LANES; half *= 2) {
    __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
    __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(LANES - half));
    __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(half)), upper, lane, _mm512_set1_epi32(LANES));
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & half)) {
        __m512 a = x[i], b = x[i + half];
        x[i] = _mm512_permutex2var_ps(a, low, b);
        x[i + half] = _mm512_permutex2var_ps(a, high, b);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) _mm512_storeu_ps(to + i * to_row, x[i]);
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) to[j * to_row + i] = from[i * from_row + j];
#endif
}

/* 2^x to 1e-7 relative for x of at most 127: a power of two times the minimax polynomial of degree 6 on [-1/2, 1/2]. */
static inline vec exp2_of_each(vec x) {
#ifdef WHOLE_VECTORS
  vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = larger(vec_of(-126.0f), x);
  vec shifted = x + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
#endif
  vec f = x - n, y = f * 1.53458124e-4f + 1.33999309e-3f;
  y = y * f + 9.61848907e-3f;
  y = y * f + 5.55032864e-2f;
  y = y * f + 2.40226462e-1f;
  y = y * f + 6.93147182e-1f;
  y = y * f + 1.0f;
#ifdef WHOLE_VECTORS
  return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return y * (vec)(((vec_bits)shifted - (0x4b400000u - 127u)) << 23);
#endif
}

#endif
