/* Norms, gates and the loss over logits, for float32 and bfloat16. What each computes stands in pointwise.inc. */
#include "scalars.h"

#define SCALAR float
#define LOAD load_f32
#define STORE store_f32
#define NAME(kernel) kernel##_f32
#include "pointwise.inc"
#undef SCALAR
#undef LOAD
#undef STORE
#undef NAME

#define SCALAR bf16
#define LOAD load_bf16
#define STORE store_bf16
#define NAME(kernel) kernel##_bf16
#include "pointwise.inc"
