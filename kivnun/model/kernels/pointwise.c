/* Norms, gates and the loss over logits, for float32 and bfloat16. What each computes stands in pointwise.inc. */
#include <omp.h>

#include "vectors.h"

enum { DRAWS = 16, COLUMNS = 256 };
static const uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

/* SplitMix64's finaliser, as in dropout.py. */
static inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

#define KERNELS "pointwise.inc"
#include "both_types.h"
