/* Vectors of floats, as wide as the processor's registers: the compiler's own arithmetic, and the few operations that it has no
 * operator for. Wider ones would go through memory: compilers do not keep them in several registers. */
#ifndef KIVNUN_VECTORS_H
#define KIVNUN_VECTORS_H

#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define WHOLE_VECTORS
#endif

#include "scalars.h"

#define LOG2_E 1.44269504088896341f
#if defined(WHOLE_VECTORS)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vec_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline vec vec_at(const float *x) { return *(const vec *)x; }
static inline void put_vec(float *to, vec x) { *(vec *)to = x; }
static inline vec vec_of(float x) { return x - (vec){0}; }

/* Runs statements for `count` numbers, a vector at a time: n of them from i on, LANES but for the last. Four vectors go together,
 * and `way` says which of the four this is: a sum in four parts does not wait for itself. */
#define EACH_VECTOR(i, n, way, count, ...)                                                         \
  do {                                                                                             \
    int64_t whole_ = (count) / (4 * LANES) * (4 * LANES);                                          \
    for (int64_t from_ = 0; from_ < whole_; from_ += 4 * LANES)                                    \
      _Pragma("GCC unroll 4") for (int way = 0; way < 4; way++) {                                  \
        const int64_t i = from_ + way * LANES, n = LANES;                                          \
        __VA_ARGS__                                                                                \
      }                                                                                            \
    for (int64_t i = whole_; i < (count); i += LANES) {                                            \
      const int64_t n = (count) - i < LANES ? (count) - i : LANES;                                 \
      enum { way = 0 };                                                                            \
      __VA_ARGS__                                                                                  \
    }                                                                                              \
  } while (0)

static inline vec vec_at_bf16(const bf16 *x) {
#ifdef WHOLE_VECTORS /* every number to the upper half of a lane, in one instruction */
  static const uint16_t order[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                     0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)x));
  return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_loadu_si512(order), halves);
#elif defined(__AVX2__) /* GCC would convert the two halves of a vector apart */
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#else
  return (vec)(__builtin_convertvector(*(const vec_halves *)x, vec_bits) << 16);
#endif
}

static inline void put_vec_bf16(bf16 *to, vec x) {
#ifdef __AVX512BF16__
  __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &halves, sizeof halves);
#else
  vec_bits bits = (vec_bits)x, nan = (vec_bits)(x != x); /* rounded as store_bf16 does */
  bits = (((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) & ~nan) | (0x7fc0u & nan);
  *(vec_halves *)to = __builtin_convertvector(bits, vec_halves);
#endif
}

/* The first n of LANES numbers, zeros in the other lanes. */
static inline vec loaded_f32(const float *x, int64_t n) {
  float some[LANES] = {0};
  if (n >= LANES) return vec_at(x);
  memcpy(some, x, n * sizeof *x);
  return vec_at(some);
}

static inline vec loaded_bf16(const bf16 *x, int64_t n) {
  bf16 some[LANES] = {0};
  if (n >= LANES) return vec_at_bf16(x);
  memcpy(some, x, n * sizeof *x);
  return vec_at_bf16(some);
}

/* Writes the first n of LANES numbers. */
static inline void stored_f32(float *to, vec x, int64_t n) {
  if (n >= LANES) put_vec(to, x);
  else memcpy(to, &x, n * sizeof *to);
}

static inline void stored_bf16(bf16 *to, vec x, int64_t n) {
  bf16 some[LANES];
  put_vec_bf16(n >= LANES ? to : some, x);
  if (n < LANES) memcpy(to, some, n * sizeof *to);
}

/* The larger of each two lanes; b where one is NaN. */
static inline vec larger(vec a, vec b) {
#ifdef WHOLE_VECTORS
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  vec_bits above = (vec_bits)(a > b);
  return (vec)((above & (vec_bits)a) | (~above & (vec_bits)b));
#endif
}

static inline uint32_t lanes_below(int64_t n) { return n <= 0 ? 0 : n >= LANES ? 0xffffu : (1u << n) - 1; }

/* x in lanes low <= i < high, `otherwise` in the others. */
static inline vec within(vec x, int64_t low, int64_t high, float otherwise) {
#ifdef WHOLE_VECTORS
  return (vec)_mm512_mask_blend_ps((__mmask16)(lanes_below(high) & ~lanes_below(low)), _mm512_set1_ps(otherwise), (__m512)x);
#else
  for (int i = 0; (low > 0 || high < LANES) && i < LANES; i++) x[i] = i >= low && i < high ? x[i] : otherwise;
  return x;
#endif
}

/* `factor` in lanes whose bits reach `limit`, 0 in the others. */
static inline vec factor_where(const uint16_t *bits, int64_t limit, float factor) {
#if defined(WHOLE_VECTORS)
  __mmask16 reaching = _mm256_cmpge_epu16_mask(_mm256_loadu_si256((const __m256i *)bits), _mm256_set1_epi16((short)limit));
  return (vec)_mm512_maskz_mov_ps(reaching, _mm512_set1_ps(factor));
#else
  vec factors;
  for (int i = 0; i < LANES; i++) factors[i] = bits[i] >= limit ? factor : 0.0f;
  return factors;
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

static inline float sum_of_four(const vec x[4]) { return sum_of((x[0] + x[1]) + (x[2] + x[3])); }

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

/* 2^x to 1e-7 relative for x of at most 127: a power of two times the minimax polynomial of degree 6 on [-1/2, 1/2]. NaN stays NaN,
 * and what lies below float32's range, -inf too, is held at its end or becomes 0. */
static inline vec exp2_of_each(vec x) {
#ifdef WHOLE_VECTORS
  vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); /* x - n, and 0 for an infinite x */
#else
  x = larger(vec_of(-126.0f), x);
  vec shifted = x + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  vec f = x - n;
#endif
  vec y = f * 1.53458124e-4f + 1.33999309e-3f;
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

/* e^x for x of at most 88, as near as x itself is when it is rounded: to 1e-7 about 0, to 4e-6 at the ends. */
static inline vec exp_of_each(vec x) { return exp2_of_each(x * LOG2_E); }

/* 1 / x to 1e-7 relative for 1e-37 < x < 1e37. */
static inline vec inverse_of_each(vec x) {
#ifdef WHOLE_VECTORS
  vec y = (vec)_mm512_rcp14_ps((__m512)x); /* to 2^-14; a step of Newton's doubles the digits */
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

static inline vec sigmoid_of_each(vec x) { return inverse_of_each(1.0f + exp2_of_each(larger(vec_of(-80.0f), x) * -LOG2_E)); }

#endif
