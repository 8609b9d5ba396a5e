/* What the kernels share: numbers of 16 and 32 bits. Next: vectors.h (many of them at once).
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

#endif
