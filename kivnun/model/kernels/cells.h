/* Small matrix products in registers, in float32 or from pairs of bfloat16. Next: attention.inc, who multiplies what.
 *
 * All products have one form, C [M, N] (+)= A [M, R] B [R, N] with N in whole vectors and C in float32. A and B are made of cells
 * of four bytes that hold `grain` numbers next to each other along R: one float, or two bfloat16 where the processor multiplies
 * those in pairs (AVX512-BF16: twice the operations). A is read by cell through two strides, so that it may be transposed; B by
 * vector of cells, likewise. A head's tokens therefore come in three layouts, of which the first two agree for single floats:
 *   rows     [tokens, K / grain]                 to be A, R running over the head
 *   stack    [tokens / grain, K]                 to be B, R running over tokens
 *   columns  [tokens / LANES, K / grain, LANES]  to be B, R running over the head */
#ifndef KIVNUN_CELLS_H
#define KIVNUN_CELLS_H

#include "vectors.h"

enum { TILE_ROWS = 6, TILE_VECTORS = 4 };
typedef float cell __attribute__((may_alias));

#ifdef __AVX512BF16__
enum { GRAIN_f32 = 1, GRAIN_bf16 = 2 };
#else
enum { GRAIN_f32 = 1, GRAIN_bf16 = 1 };
#endif

#define ALWAYS static inline __attribute__((always_inline))

static inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* The next of as few pieces as possible, about equal: a narrow last tile would wait for its own sums. */
static inline int64_t piece(int64_t left, int64_t largest, int64_t multiple) {
  if (left <= largest) return left;
  int64_t pieces = (left + largest - 1) / largest, even = (left + pieces - 1) / pieces;
  return least((even + multiple - 1) / multiple * multiple, left);
}

/* A or B of a product: `step` goes to the next cell along R, `next` to A's next row or B's next vector. */
struct operand {
  const cell *at;
  int64_t next, step;
};

/* What a tile computes. The operands' strides are in bytes here: GCC would add a loop for a step of one cell, and lose registers. */
struct product {
  struct operand a, b;
  int64_t R;
  float *c;
  int64_t c_row;
  int add; /* to what stands in C */
};

ALWAYS vec multiply_add(const int grain, vec sum, cell a, vec b) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    __m512i pairs = _mm512_castps_si512(_mm512_set1_ps(a)), column = _mm512_castps_si512((__m512)b);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)column);
  }
#endif
  return sum + a * b;
}

/* Keeps what was worked out before from being held in registers that the sums need; addresses are cheaper to work out again. */
#define FORGET() __asm__ volatile("" ::: "memory")

ALWAYS void tile(const int grain, const int rows, const int vectors, const struct product *p) {
  vec sum[TILE_ROWS][TILE_VECTORS];
  float *c = p->c;
  int64_t c_row = p->c_row;
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) sum[m][n] = p->add ? vec_at(c + m * c_row + n * LANES) : (vec){0};
  FORGET();
  const char *a = (const char *)p->a.at, *b = (const char *)p->b.at;
  const int64_t a_next = p->a.next, a_step = p->a.step, b_next = p->b.next, b_step = p->b.step;
  for (int64_t r = p->R; r > 0; r--, a += a_step, b += b_step) {
    vec column[TILE_VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) column[n] = vec_at((const float *)(b + n * b_next));
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      cell factor = *(const cell *)(a + m * a_next);
#pragma GCC unroll 8
      for (int n = 0; n < vectors; n++) sum[m][n] = multiply_add(grain, sum[m][n], factor, column[n]);
    }
  }
  FORGET();
  c = p->c, c_row = p->c_row;
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) put_vec(c + m * c_row + n * LANES, sum[m][n]);
}

/* Each size is a function of its own: in one together, compilers do not keep the sums in registers. */
#define TILE(grain, rows, vectors) \
  static __attribute__((noinline)) void tile_##grain##_##rows##x##vectors(const struct product *p) { tile(grain, rows, vectors, p); }
#define TILES_OF(grain, rows) TILE(grain, rows, 1) TILE(grain, rows, 2) TILE(grain, rows, 3) TILE(grain, rows, 4)
#define NAMES_OF(grain, rows) \
  {0, tile_##grain##_##rows##x1, tile_##grain##_##rows##x2, tile_##grain##_##rows##x3, tile_##grain##_##rows##x4}
#define TILES(grain)                                                                                                          \
  TILES_OF(grain, 1) TILES_OF(grain, 2) TILES_OF(grain, 3) TILES_OF(grain, 4) TILES_OF(grain, 5) TILES_OF(grain, 6)           \
  static void (*const tiles_##grain[TILE_ROWS + 1][TILE_VECTORS + 1])(const struct product *) = {                             \
      {0},                NAMES_OF(grain, 1), NAMES_OF(grain, 2), NAMES_OF(grain, 3), NAMES_OF(grain, 4), NAMES_OF(grain, 5), \
      NAMES_OF(grain, 6)};

TILES(1)
#ifdef __AVX512BF16__
TILES(2)
#else
#define tiles_2 tiles_1
#endif

/* A product of 1 to TILE_ROWS rows of C and any number of vectors. */
static inline void multiply(const int grain, int64_t rows, int64_t N, int64_t R, struct operand a, struct operand b, float *c,
                            int64_t c_row, int add) {
  struct product p = {{a.at, 4 * a.next, 4 * a.step}, {b.at, 4 * b.next, 4 * b.step}, R, c, c_row, add};
  for (int64_t left = N / LANES, vectors; left > 0; left -= vectors, p.b.at += vectors * b.next, p.c += vectors * LANES) {
    vectors = piece(left, TILE_VECTORS, 1);
    (grain == 1 ? tiles_1 : tiles_2)[rows][vectors](&p);
  }
}

/* One token's vector as cells of its row. */
ALWAYS void put_row(const int grain, vec x, cell *to) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &half, sizeof half);
    return;
  }
#endif
  put_vec(to, x);
}

/* Two tokens' vectors, one after the other, as cells of the stack whose rows are `next` apart. */
ALWAYS void put_stack(const int grain, vec even, vec odd, cell *to, int64_t next) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
    return;
  }
#endif
  put_vec(to, even);
  put_vec(to + next, odd);
}

/* LANES tokens [LANES, K], which this may overwrite, in the layouts that are asked for. Those that agree may be one, `from` too. */
ALWAYS void put_tokens(const int grain, float *from, int K, cell *rows, cell *stack, cell *columns) {
  const int depth = K / grain;
  for (int64_t i = 0; stack && stack != rows && stack != from && i < LANES; i += 2)
    for (int64_t d = 0; d < K; d += LANES)
      put_stack(grain, vec_at(from + i * K + d), vec_at(from + (i + 1) * K + d), stack + i / grain * K + d, K);
  if (!rows && !columns) return;
  if (!rows) rows = from;
  if (grain == 2 || rows != from)
    for (int64_t d = 0; d < LANES * K; d += LANES) put_row(grain, vec_at(from + d), rows + d / grain);
  if (!columns) return;
  int64_t r = 0;
  for (; r + LANES <= depth; r += LANES) transpose(rows + r, depth, columns + r * LANES, LANES);
  for (; r < depth; r++)
    for (int64_t i = 0; i < LANES; i++) columns[r * LANES + i] = rows[i * depth + r];
}

#endif
