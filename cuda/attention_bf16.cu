// Attention of bf16 numbers. A file a dtype: a program loads the kernels of the one it uses.
#include "attention_backward.cuh"
#include "attention_forward.cuh"

#define OF_SIZE(SIZE)      \
  FORWARD(bf16, __nv_bfloat16, SIZE)    \
  BACKWARD(bf16, __nv_bfloat16, SIZE)
OF_SIZE(64)
OF_SIZE(96)
OF_SIZE(128)
OF_SIZE(256)
DELTA(bf16, __nv_bfloat16)
