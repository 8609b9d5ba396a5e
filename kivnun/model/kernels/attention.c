/* Causal attention of packed rows: small matrix products in registers, and softmax. What is computed stands in attention.inc.
 *
 * All products have one form, C [M, N] += A [M, R] B [R, N] with N in whole vectors and C in float32. A and B are made of cells of
 * four bytes that hold `grain` numbers next to each other along R: one float, or two bfloat16 where the processor multiplies
 * those in pairs (AVX512-BF16: twice the operations). A is read by cell through two strides, so that it may be transposed; B by
 * vector of cells, likewise. A head's tokens therefore come in three layouts, the same one for single floats where two agree:
 *   rows     [tokens, K / grain]             to be A, R running over the head
 *   stack    [tokens / grain, K]             to be B, R running over tokens
 *   columns  [tokens / 16, K / grain, 16]    to be B, R running over the head */
#include <stdlib.h>

#include "vectors.h"

#define LOG2_E 1.44269504088896341f
#define LOWEST -1e38f /* below every score; less than infinity, so that two of them have a difference */
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };
#ifndef QUERIES
#define QUERIES 96
#endif
#ifndef KEYS
#define KEYS 256
#endif
#ifndef AHEAD
#define AHEAD 12
#endif
#ifndef SPAN
#define SPAN 512
#endif
#ifndef PITCH
#define PITCH (KEYS + LANES)
#endif
typedef float cell __attribute__((may_alias));

#ifdef __AVX512BF16__
enum { GRAIN_f32 = 1, GRAIN_bf16 = 2 };
#else
enum { GRAIN_f32 = 1, GRAIN_bf16 = 1 };
#endif

/* One pass. Strides are in elements; `*_stride` goes to the next token, `*_head` to the next head. `window` 0 means none. */
struct attention {
  const void *q, *k, *v;
  void *out;
  const void *dout;
  void *dq, *dk, *dv;
  float *lse;              /* [heads, tokens]: log of the sum of exp(scale * score) */
  const float *cos, *sin;  /* [tokens, angle_stride], the first rot / 2 of each used */
  int64_t q_stride, k_stride, v_stride, out_stride, dq_stride, dk_stride, dv_stride;
  int64_t q_head, k_head, v_head, dq_head, dk_head, dv_head;
  int64_t tokens, angle_stride, window;
  int groups, per_group, head_dim, width, rot;
  float scale;
};

static inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* The next of as few pieces as possible, about equal: a narrow last tile would wait for its own sums. */
static inline int64_t piece(int64_t left, int64_t largest, int64_t multiple) {
  int64_t pieces = (left + largest - 1) / largest, even = (left + pieces - 1) / pieces;
  return least((even + multiple - 1) / multiple * multiple, left);
}

static inline int64_t lowest_key(const struct attention *a, int64_t query) {
  return a->window ? most(query - a->window + 1, 0) : 0;
}

static inline int64_t first_key(const struct attention *a, int64_t query) { return lowest_key(a, query) / LANES * LANES; }

static inline void *take(char **scratch, int64_t cells) {
  void *here = *scratch;
  *scratch += (sizeof(cell) * cells + 63) / 64 * 64;
  return here;
}

static inline __attribute__((always_inline)) vec multiply_add(const int grain, vec sum, cell a, vec b) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    __m512i pairs = _mm512_castps_si512(_mm512_set1_ps(a)), column = _mm512_castps_si512((__m512)b);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)column);
  }
#endif
  return sum + a * b;
}

/* A or B of a product: `step` goes to the next cell along R, `next` to A's next row or B's next vector. */
struct operand {
  const cell *at;
  int64_t next, step;
};

struct product {
  struct operand a, b;
  int64_t R;
  float *c;
  int64_t c_row;
  int add; /* to what stands in C */
};

/* Keeps what was worked out before from being held in registers that the sums need; addresses are cheaper to work out again. */
#define FORGET() __asm__ volatile("" ::: "memory")

static inline __attribute__((always_inline)) void tile(const int grain, const int rows, const int vectors, const struct product *p) {
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

/* Each size is a function of its own: together, the compiler keeps the sums of none of them in registers all along. */
#define TILE(grain, rows, vectors) \
  static __attribute__((noinline)) void tile_##grain##_##rows##x##vectors(const struct product *p) { tile(grain, rows, vectors, p); }
#define TILES_OF(grain, rows) TILE(grain, rows, 1) TILE(grain, rows, 2) TILE(grain, rows, 3) TILE(grain, rows, 4)
#define TILES(grain) \
  TILES_OF(grain, 1) TILES_OF(grain, 2) TILES_OF(grain, 3) TILES_OF(grain, 4) TILES_OF(grain, 5) TILES_OF(grain, 6)
#define NAMES_OF(grain, rows) {tile_##grain##_##rows##x1, tile_##grain##_##rows##x2, tile_##grain##_##rows##x3, tile_##grain##_##rows##x4}
#define NAMES(grain) \
  {NAMES_OF(grain, 1), NAMES_OF(grain, 2), NAMES_OF(grain, 3), NAMES_OF(grain, 4), NAMES_OF(grain, 5), NAMES_OF(grain, 6)}

typedef void (*tile_kernel)(const struct product *);
TILES(1)
static const tile_kernel tiles_1[TILE_ROWS][TILE_VECTORS] = NAMES(1);
#ifdef __AVX512BF16__
TILES(2)
static const tile_kernel tiles_2[TILE_ROWS][TILE_VECTORS] = NAMES(2);
#else
#define tiles_2 tiles_1
#endif

/* At most TILE_ROWS rows of C, any number of vectors. */
static inline void strip(const int grain, int64_t rows, int64_t N, int64_t R, struct operand a, struct operand b, float *c,
                         int64_t c_row, int add) {
  struct product p = {{a.at, 4 * a.next, 4 * a.step}, {b.at, 4 * b.next, 4 * b.step}, R, c, c_row, add};
  for (int64_t left = N / LANES, vectors; left > 0; left -= vectors, p.b.at += vectors * b.next, p.c += vectors * LANES) {
    vectors = piece(left, TILE_VECTORS, 1);
    (grain == 1 ? tiles_1 : tiles_2)[rows - 1][vectors - 1](&p);
  }
}

/* Asks for the lines of n tokens' vectors while there is other work to do. */
static inline void fetch(const void *at, int64_t stride, int64_t n, int64_t bytes) {
  for (int64_t t = 0; t < n; t++)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const char *)at + t * stride + b, 0, 2);
}

/* One token's vector as cells of its row. */
static inline __attribute__((always_inline)) void put_row(const int grain, vec x, cell *to) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &half, sizeof half);
    return;
  }
#endif
  put_vec(to, x);
}

/* Two tokens' vectors, one after the other, as cells of the stack. */
static inline __attribute__((always_inline)) void put_stack(const int grain, vec even, vec odd, cell *to, int64_t next) {
#ifdef __AVX512BF16__
  if (grain == 2) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
    return;
  }
#endif
  put_vec(to, even);
  put_vec(to + next, odd);
}

/* LANES tokens [LANES, K] in the layouts that are asked for. `stack` may be `rows` where the two agree. */
static inline __attribute__((always_inline)) void put_tokens(const int grain, float *from, int K, cell *rows, cell *stack,
                                                             cell *columns) {
  const int depth = K / grain;
  for (int64_t i = 0; stack && stack != rows && i < LANES; i += 2)
    for (int64_t d = 0; d < K; d += LANES)
      put_stack(grain, vec_at(from + i * K + d), vec_at(from + (i + 1) * K + d), stack + i / grain * K + d, K);
  if (!rows) rows = from;
  for (int64_t d = 0; d < LANES * K; d += LANES) put_row(grain, vec_at(from + d), rows + d / grain);
  for (int64_t r = 0; columns && r < depth; r++)
    for (int64_t i = 0; i < LANES; i++) columns[r * LANES + i] = rows[i * depth + r];
}

/* What a strip of queries sees of a block of keys, relative to the strip's first vector of keys: row r sees [low + r, high + r) of
 * `end`, where low counts only in a sliding window. */
struct sight {
  int64_t rows, low, high, end;
  int windowed;
};

static inline int all_see(const struct sight *s, int64_t j) {
  return j + LANES <= s->high && (!s->windowed || j >= s->low + s->rows - 1);
}

static inline vec as_seen(const struct sight *s, int64_t row, int64_t j, vec x, float otherwise) {
  return within(x, s->windowed ? s->low + row - j : 0, s->high + row - j, otherwise);
}

/* Scores become 2^(scale * (score - highest)) as cells, zero where not seen, with the highest of each row so far. When that
 * rises, the sum so far and, if there is one, the output so far shrink. */
static inline __attribute__((always_inline)) void softmax(const int grain, struct sight s, float *scores, float scale,
                                                          float *highest, float *sum, float *out, int K, cell *p) {
  vec top[TILE_ROWS], total[TILE_ROWS];
  for (int64_t row = 0; row < s.rows; row++) top[row] = vec_of(highest[row]), total[row] = (vec){0};
  for (int64_t j = 0; j < s.end; j += LANES) {
    int all = all_see(&s, j);
    for (int64_t row = 0; row < s.rows; row++) {
      vec x = vec_at(scores + row * PITCH + j);
      top[row] = larger(all ? x : as_seen(&s, row, j, x, LOWEST), top[row]);
    }
  }
  vec before = vec_at(highest), now = before;
  for (int64_t row = 0; row < s.rows; row++) now[row] = largest_of(top[row]);
  vec shrink = exp2_of_each((before - now) * scale);
  for (int64_t j = 0; j < s.end; j += LANES) {
    int all = all_see(&s, j);
    for (int64_t row = 0; row < s.rows; row++) {
      vec x = exp2_of_each((vec_at(scores + row * PITCH + j) - now[row]) * scale);
      if (!all) x = as_seen(&s, row, j, x, 0.0f);
      total[row] += x;
      put_row(grain, x, p + (row * PITCH + j) / grain);
    }
  }
  for (int64_t row = 0; row < s.rows; row++) {
    sum[row] = (out ? sum[row] * shrink[row] : 0.0f) + sum_of(total[row]);
    highest[row] = now[row];
    if (out && shrink[row] != 1.0f)
      for (int d = 0; d < K; d += LANES) put_vec(out + row * K + d, vec_at(out + row * K + d) * shrink[row]);
  }
}

/* Scores become probabilities p, and dp becomes the scores' gradient p * (dp - pull) * scale; both zero where not seen. */
static inline void softmax_backward(struct sight s, float *scores, float *dp, float scale, const float *lse, const float *pull) {
  for (int64_t j = 0; j < s.end; j += LANES) {
    int all = all_see(&s, j);
    for (int64_t row = 0; row < s.rows; row++) {
      float *at = scores + row * PITCH + j, *d = dp + row * PITCH + j;
      vec p = exp2_of_each(vec_at(at) * (scale * LOG2_E) - lse[row] * LOG2_E);
      if (!all) p = as_seen(&s, row, j, p, 0.0f);
      put_vec(at, p);
      put_vec(d, p * (vec_at(d) - pull[row]) * scale);
    }
  }
}

static int64_t scratch_bytes(int64_t longest, int width) {
  int64_t P = whole(longest);
  return (int64_t)sizeof(float) * (6 * P * width + 4 * QUERIES * width + 4 * QUERIES * PITCH + LANES * width) + 32 * 64;
}

typedef void (*row_kernel)(const struct attention *, int64_t, int64_t, int, char *);

/* Runs a kernel over every (row, key/value head). Returns 1 when there is no memory for its scratch. */
static int over_rows(const struct attention *a, const int64_t *lengths, int64_t rows, int threads, row_kernel kernel) {
  int64_t longest = 0;
  int failed = 0;
  int64_t *starts = malloc(sizeof(int64_t) * (rows + 1));
  if (!starts) return 1;
  starts[0] = 0;
  for (int64_t row = 0; row < rows; row++) {
    starts[row + 1] = starts[row] + lengths[row];
    longest = lengths[row] > longest ? lengths[row] : longest;
  }
#pragma omp parallel num_threads(threads)
  {
    char *scratch = aligned_alloc(64, (scratch_bytes(longest, a->width) + 63) / 64 * 64);
    if (!scratch) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < rows * a->groups; task++) {
      int64_t row = task / a->groups;
      if (scratch) kernel(a, starts[row], lengths[row], (int)(task % a->groups), scratch);
    }
    free(scratch);
  }
  free(starts);
  return failed;
}

#define KERNELS "attention.inc"
#include "both_types.h"
