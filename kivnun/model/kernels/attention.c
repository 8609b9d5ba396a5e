/* Causal attention of packed rows: small float32 matrix products in registers, and softmax. What is computed stands in attention.inc.
 *
 * All products have one form, C [M, N] (+)= A [M, R] B [R, N] with N in whole vectors: A is read by element through two strides, so
 * that it may be transposed, and B by vector. */
#include <stdlib.h>

#include "scalars.h"

enum { LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4, MAX_QUERIES = 48, MAX_SCORES = 49152 };
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));

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

/* Few enough queries that their scores stay in the second-level cache. A multiple of the tile's rows. */
static inline int64_t queries_of_block(int64_t padded_length) {
  int64_t fit = MAX_SCORES / padded_length / TILE_ROWS * TILE_ROWS;
  return fit < TILE_ROWS ? TILE_ROWS : fit > MAX_QUERIES ? MAX_QUERIES : fit;
}

static inline int64_t lowest_key(const struct attention *a, int64_t query) {
  int64_t low = a->window ? query - a->window + 1 : 0;
  return low < 0 ? 0 : low;
}

static inline int64_t first_key(const struct attention *a, int64_t query) { return lowest_key(a, query) / LANES * LANES; }

static inline float *take(char **scratch, int64_t floats) {
  float *here = (float *)*scratch;
  *scratch += (sizeof(float) * floats + 63) / 64 * 64;
  return here;
}

static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, int64_t R, const float *a, int64_t a_row,
                                                       int64_t a_r, const float *b, int64_t b_row, float *c, int64_t c_row,
                                                       int add) {
  vec sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) sum[m][n] = add ? *(const vec *)(c + m * c_row + n * LANES) : (vec){0};
  for (int64_t r = 0; r < R; r++) {
    vec column[TILE_VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) column[n] = *(const vec *)(b + r * b_row + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      float factor = a[m * a_row + r * a_r];
#pragma GCC unroll 8
      for (int n = 0; n < vectors; n++) sum[m][n] += factor * column[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) *(vec *)(c + m * c_row + n * LANES) = sum[m][n];
}

#define TILES_OF(rows)                                                                     \
  switch (vectors) {                                                                       \
    case 4: tile(rows, 4, R, a, a_row, a_r, b, b_row, c, c_row, add); break;               \
    case 3: tile(rows, 3, R, a, a_row, a_r, b, b_row, c, c_row, add); break;               \
    case 2: tile(rows, 2, R, a, a_row, a_r, b, b_row, c, c_row, add); break;               \
    default: tile(rows, 1, R, a, a_row, a_r, b, b_row, c, c_row, add);                     \
  }

static void tiles(int64_t rows, int64_t vectors, int64_t R, const float *a, int64_t a_row, int64_t a_r, const float *b, int64_t b_row,
                  float *c, int64_t c_row, int add) {
  switch (rows) {
    case 6: TILES_OF(6) break;
    case 5: TILES_OF(5) break;
    case 4: TILES_OF(4) break;
    case 3: TILES_OF(3) break;
    case 2: TILES_OF(2) break;
    default: TILES_OF(1)
  }
}

static void product(int64_t M, int64_t N, int64_t R, const float *a, int64_t a_row, int64_t a_r, const float *b, int64_t b_row,
                    float *c, int64_t c_row, int add) {
  for (int64_t n = 0; n < N; n += LANES * TILE_VECTORS) {
    int64_t vectors = (N - n) / LANES < TILE_VECTORS ? (N - n) / LANES : TILE_VECTORS;
    for (int64_t m = 0; m < M; m += TILE_ROWS) {
      int64_t rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;
      tiles(rows, vectors, R, a + m * a_row, a_row, a_r, b + n, b_row, c + m * c_row + n, c_row, add);
    }
  }
}

/* [L, K] -> [K, P], zero from L on. */
static void transpose(const float *from_LK, int64_t L, int K, int64_t P, float *to_KP) {
  for (int64_t block = 0; block < P; block += LANES)
    for (int k = 0; k < K; k++)
      for (int64_t t = block; t < block + LANES; t++) to_KP[k * P + t] = t < L ? from_LK[t * K + k] : 0.0f;
}

/* Scores [low, high) become probabilities, the others up to `end` zero. Returns the log-sum. */
static float softmax(float *scores, int64_t low, int64_t high, int64_t end, float scale) {
  float highest = scores[low], sum = 0.0f;
#pragma omp simd reduction(max : highest)
  for (int64_t j = low; j < high; j++) highest = scores[j] > highest ? scores[j] : highest;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = low; j < high; j++) {
    scores[j] = exp_of((scores[j] - highest) * scale);
    sum += scores[j];
  }
  float share = 1.0f / sum;
#pragma omp simd
  for (int64_t j = low; j < high; j++) scores[j] *= share;
  for (int64_t j = 0; j < low; j++) scores[j] = 0.0f;
  for (int64_t j = high; j < end; j++) scores[j] = 0.0f;
  return highest * scale + logf(sum);
}

/* Scores become probabilities p, and dp becomes the scores' gradient p * (dp - pull) * scale; both zero outside [low, high). */
static void softmax_backward(float *scores, float *dp, int64_t low, int64_t high, int64_t end, float scale, float lse, float pull) {
  for (int64_t j = 0; j < low; j++) scores[j] = dp[j] = 0.0f;
#pragma omp simd
  for (int64_t j = low; j < high; j++) {
    scores[j] = exp_of(scores[j] * scale - lse);
    dp[j] = scores[j] * (dp[j] - pull) * scale;
  }
  for (int64_t j = high; j < end; j++) scores[j] = dp[j] = 0.0f;
}

static int64_t scratch_bytes(int64_t longest, int width) {
  int64_t P = whole(longest), scores = MAX_SCORES + TILE_ROWS * P;
  return (int64_t)sizeof(float) * (6 * P * width + 3 * MAX_QUERIES * width + 2 * scores) + 16 * 64;
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
