/* Frozen weights of 4 and 8 bits, decoded to float32 or bfloat16. What each kernel computes stands in reference.py. */
#include "scalars.h"

#define GROUP 256 /* blocks whose scales share a scale of their own */

/* The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E). */
static const float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                              -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                              0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                              0.7229568362236023f, 1.0f};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512BW__)
#define HAS_LOOK_UP
typedef float floats16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));
typedef uint16_t halves16 __attribute__((vector_size(32)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));

/* Decodes a block's whole vectors and returns how many elements those are. A register holds 16 words, so that looking one up by 4
 * bits is one instruction. A byte's first element is its high half, and goes to the low half of a word. Bytes become words in two
 * conversions of one instruction each; GCC takes a single one apart. */
static inline int64_t nf4_vectors(const uint8_t *codes, float scale, bf16 *out, int64_t count) {
  floats16 values;
  memcpy(&values, NF4, sizeof values);
  values *= scale;
  words16 bits = (words16)values, nan = (words16)(values != values); /* rounded as store_bf16 does */
  words16 table = (((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) & ~nan) | (0x7fc0u & nan), raised = table << 16;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    bytes16 packed;
    memcpy(&packed, codes + i / 2, sizeof packed);
    words16 byte = __builtin_convertvector(__builtin_convertvector(packed, halves16), words16);
    words16 pair = __builtin_shuffle(table, byte >> 4) | __builtin_shuffle(raised, byte & 15);
    memcpy(out + i, &pair, sizeof pair);
  }
  return i;
}
#endif

/* Two loops, so that the product is rounded before the sum: in one, compilers make both one operation. */
static inline void scales_of_group(const uint8_t *codes, const float *map, float absmax, float offset, int64_t count, float *scales) {
  for (int64_t i = 0; i < count; i++)
    scales[i] = map[codes[i]] * absmax;
  for (int64_t i = 0; i < count; i++)
    scales[i] += offset;
}

#define SCALAR float
#define LOAD load_f32
#define STORE store_f32
#define LOOKED_UP(codes, scale, out, count) 0
#define NAME(kernel) kernel##_f32
#include "quantised.inc"
#undef SCALAR
#undef LOAD
#undef STORE
#undef LOOKED_UP
#undef NAME

#define SCALAR bf16
#define LOAD load_bf16
#define STORE store_bf16
#ifdef HAS_LOOK_UP
#define LOOKED_UP nf4_vectors
#else
#define LOOKED_UP(codes, scale, out, count) 0
#endif
#define NAME(kernel) kernel##_bf16
#include "quantised.inc"
