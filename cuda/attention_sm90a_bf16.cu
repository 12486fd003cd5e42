// Attention of bf16 numbers on Hopper, of heads of at most 128 dimensions.
#include "attention_backward_sm90a.cuh"
#include "attention_forward_sm90a.cuh"

#define OF_SIZE(SIZE)                \
  FORWARD(bf16, __nv_bfloat16, SIZE) \
  BACKWARD(bf16, __nv_bfloat16, SIZE)
OF_SIZE(64)
OF_SIZE(128)
