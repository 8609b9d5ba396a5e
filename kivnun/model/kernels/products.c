/* Matrix products for processors with AVX-512: out [M, N] = factor * (left [M, K] right [K, N] + low [M, R] low_right [R, N]).
 * Dropout may take `left` or the second product on the way, so that no dropped matrix is ever written.
 *
 * The right factor is packed beforehand into panels of 32 columns, in the order in which it is read, so that a frozen weight is
 * packed once. A tile of up to 14 rows by one panel is summed in registers, in float32, and rounded once when it is stored; the
 * second product, an adapter's, goes into the same sums. An element's sums run over K in one order, whatever M, N or the threads:
 * a row's result depends on that row alone (the tiling is that of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix
 * Multiplication"). Where the processor lacks the instructions, `products_serve` says so and nothing else may be called. */
#include <stdlib.h>

#include "draws.h"
#include "scalars.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SERVES_F32 1
#else
#define SERVES_F32 0
#endif
#if SERVES_F32 && defined(__AVX512BF16__)
#define SERVES_BF16 1
#else
#define SERVES_BF16 0
#endif

/* Which element types are multiplied here: bit 0 float32, bit 1 bfloat16. */
int products_serve(void) { return SERVES_F32 | SERVES_BF16 << 1; }

#if SERVES_F32
#include <immintrin.h>

enum {
  LANES = 16,
  PANEL = 2 * LANES,
  TILE_ROWS = 14,          /* with two vectors a row: 28 of the 32 registers */
  CHUNK_TILES = 8,         /* tiles of a task whose sums wait in memory between parts of K */
  DEPTH_BYTES = 3072,      /* of a row of the left factor at once: a tile of it stays in the first-level cache */
  BLOCK_BYTES = 600000,    /* of the right factor at once: it stays in the second-level cache */
  MAX_PANELS = 12,
  AHEAD_BYTES = 4096,      /* how far ahead the right factor is fetched */
  ALIASED_BYTES = 4096,    /* rows that lie this far apart fall into the same few lines of the first-level cache */
  OUTER_TOKENS = 128,
  ROWS_AHEAD = 8           /* of a matrix that is packed: at least as many as are multiplied in one instruction */
};

/* How the right factor is given: in panels, or as a matrix that is packed block by block on the way. */
enum { PACKED, STRAIGHT, TRANSPOSED };

/* What drops: nothing, the left factor, or the second product. */
enum { NOTHING, LEFT, LOW };

struct dropout {
  const int64_t *keys; /* one per row */
  int64_t site, limit;
  float factor; /* of what stays */
  int what;
};

struct product {
  const void *left, *right, *low, *low_right;
  void *out;
  int64_t left_row, right_row, low_row, out_row; /* from one row to the next, in elements */
  int64_t M, N, K, R;                            /* R 0: no second product */
  int given;
  int wide;     /* the result is float32, whatever the factors are */
  float factor; /* of all sums, before they are rounded */
  struct dropout drop;
};

/* `columns` of a block, in panels of `width`; `depth` of K at once, in `parts`; whether tiles of the left factor are copied
 * (and dropped on the way). */
struct blocking {
  int64_t width, columns, depth, parts, tiles;
  int copies;
};

/* What of K a tile sums now: `left` begins at `from`; sums that are not begun or not done here wait in `partial`. */
struct part {
  const void *left;
  int64_t left_row, from, count, partial_row;
  float *partial;
  int first, last;
};

static inline __mmask16 columns_mask(int64_t columns) { return columns >= LANES ? 0xffff : (__mmask16)((1u << columns) - 1); }

/* Which of 32 channels from `channel` on, a multiple of four, stay in a row. */
static inline __mmask32 staying(const struct dropout *drop, int64_t row, int64_t channel) {
  typedef uint64_t draws __attribute__((vector_size(64)));
  const draws counters = {0, GOLDEN, 2 * GOLDEN, 3 * GOLDEN, 4 * GOLDEN, 5 * GOLDEN, 6 * GOLDEN, 7 * GOLDEN};
  draws z = counters + (key_at_site(drop->keys[row], drop->site) + (uint64_t)(channel / 4) * GOLDEN);
  MIX(z);
  return _mm512_cmpge_epu16_mask((__m512i)z, _mm512_set1_epi16((short)drop->limit));
}

/* Transposes 16 x 16 units of 32 bits. */
static inline void turn(__m512i rows[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    __m512i a = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88), b = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88), d = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

/* Units of 32 bits [N, K] -> panels [K, width]: of float32 numbers, or of pairs of bfloat16 numbers that lie side by side. */
static void pack_turned(const int32_t *from, int64_t N, int64_t K, int64_t row, int64_t width, int32_t *to) {
  for (int64_t n = 0; n < N; n += LANES) {
    int32_t *panel = to + n / width * width * K + n % width;
    for (int64_t k = 0; k < K; k += LANES) {
      const int64_t rows = N - n < LANES ? N - n : LANES, units = K - k < LANES ? K - k : LANES;
      __m512i block[16];
      for (int i = 0; i < 16; i++)
        block[i] = i < rows ? _mm512_maskz_loadu_epi32(columns_mask(units), from + (n + i) * row + k) : _mm512_setzero_si512();
      for (int i = 0; i < rows; i++) _mm_prefetch((const char *)(from + (n + i) * row + k + 4 * LANES), _MM_HINT_T0);
      turn(block);
      for (int i = 0; i < units; i++) _mm512_storeu_si512(panel + (k + i) * width, block[i]);
    }
  }
}

/* Numbers of a factor that are multiplied in one instruction: one of float32, a pair of bfloat16. */
#define SCALAR float
#define NAME(kernel) kernel##_f32
#define GROUP 1
static inline __m512 left_f32(const float *at) { return _mm512_set1_ps(*at); }
static inline __m512 multiplied_f32(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
static inline void stored_f32(float *at, __m512 sum, int64_t columns) { _mm512_mask_storeu_ps(at, columns_mask(columns), sum); }
static inline void rows_side_by_side_f32(const float *row, int64_t columns, const float *next, __m512 side[2]) {
  (void)next;
  side[0] = _mm512_maskz_loadu_ps(columns_mask(columns), row);
  side[1] = columns > LANES ? _mm512_maskz_loadu_ps(columns_mask(columns - LANES), row + LANES) : _mm512_setzero_ps();
}
static inline void in_order_f32(__m512 side[2]) { (void)side; }
static inline void dropped_f32(const float *from, int64_t columns, __mmask32 stays, float factor, float *to) {
  for (int v = 0; v < 2 && columns > v * LANES; v++) {
    const __mmask16 mask = columns_mask(columns - v * LANES);
    __m512 factors = _mm512_maskz_mov_ps((__mmask16)(stays >> v * LANES), _mm512_set1_ps(factor));
    _mm512_mask_storeu_ps(to + v * LANES, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + v * LANES), factors));
  }
}
#include "products.inc"
#undef SCALAR
#undef NAME
#undef GROUP

#if SERVES_BF16
#define SCALAR bf16
#define NAME(kernel) kernel##_bf16
#define GROUP 2
static inline __m512 left_bf16(const bf16 *at) {
  int32_t pair;
  memcpy(&pair, at, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
static inline __m512 multiplied_bf16(__m512 sum, __m512 a, __m512 b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
static inline void stored_bf16(bf16 *at, __m512 sum, int64_t columns) {
  _mm256_mask_storeu_epi16(at, columns_mask(columns), (__m256i)_mm512_cvtneps_pbh(sum));
}
static inline void dropped_bf16(const bf16 *from, int64_t columns, __mmask32 stays, float factor, bf16 *to) {
  const __mmask32 mask = columns >= PANEL ? 0xffffffffu : (1u << columns) - 1;
  const __m512i x = _mm512_maskz_loadu_epi16(mask, from);
  __m512 half[2];
  for (int v = 0; v < 2; v++) {
    const __m256i numbers = v ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
    __m512 factors = _mm512_maskz_mov_ps((__mmask16)(stays >> v * LANES), _mm512_set1_ps(factor));
    half[v] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16)), factors);
  }
  _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
}
/* Two rows of up to 32 columns as pairs; in an order that `in_order` undoes for sums. */
static inline void rows_side_by_side_bf16(const bf16 *row, int64_t columns, const bf16 *next, __m512 side[2]) {
  const __mmask32 mask = columns >= PANEL ? 0xffffffffu : (1u << columns) - 1;
  __m512i a = _mm512_maskz_loadu_epi16(mask, row), b = _mm512_maskz_loadu_epi16(mask, next);
  side[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
  side[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
}
static inline void in_order_bf16(__m512 side[2]) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  __m512 a = _mm512_permutex2var_ps(side[0], low, side[1]), b = _mm512_permutex2var_ps(side[0], high, side[1]);
  side[0] = a;
  side[1] = b;
}
#include "products.inc"
#endif
#endif
