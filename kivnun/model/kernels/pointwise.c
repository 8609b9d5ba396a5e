/* Norms, gates and the loss over logits, for float32 and bfloat16. What each computes stands in pointwise.inc. */
#include <omp.h>

#include "draws.h"
#include "vectors.h"

enum { DRAWS = 16, COLUMNS = 256 };

#define KERNELS "pointwise.inc"
#include "both_types.h"
