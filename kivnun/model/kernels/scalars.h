/* What the kernels share: numbers of 16 and 32 bits, and an exponential that compilers turn into vector code.
 *
 * Every kernel computes in float32 and rounds once when it stores. A row's result depends on that row alone: never on how many rows
 * share the call, nor on the number of threads. */
#ifndef KIVNUN_SCALARS_H
#define KIVNUN_SCALARS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float load_bf16(const bf16 *at) { return bits_to_float((uint32_t)*at << 16); }
static inline float load_f32(const float *at) { return *at; }
static inline void store_f32(float *at, float value) { *at = value; }

/* Rounds to nearest, ties to even, as torch does; NaN stays NaN. */
static inline void store_bf16(bf16 *at, float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *at = value != value ? (bf16)0x7fc0 : (bf16)rounded;
}

/* e^x to 1e-7 relative between -87 and 88, held at the ends outside. Cody and Waite's reduction, then the degree-6 minimax
 * polynomial of Cephes' expf (Moshier). Comparisons are written so that NaN passes through. */
static inline float exp_of(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  float shifted = x * 1.44269504088896341f + magic;
  float n = shifted - magic;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) - float_to_bits(magic) + 127u) << 23);
}

static inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

#endif
