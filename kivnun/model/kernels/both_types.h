/* Includes the file that KERNELS names twice: once for float32 and once for bfloat16. */
#define SCALAR float
#define LOAD load_f32
#define STORE store_f32
#define NAME(kernel) kernel##_f32
#include KERNELS
#undef SCALAR
#undef LOAD
#undef STORE
#undef NAME

#define SCALAR bf16
#define LOAD load_bf16
#define STORE store_bf16
#define NAME(kernel) kernel##_bf16
#include KERNELS
#undef SCALAR
#undef LOAD
#undef STORE
#undef NAME
