// Attention of f16 numbers on Hopper, of heads of at most 128 dimensions.
#include "attention_backward_sm90a.cuh"
#include "attention_forward_sm90a.cuh"

#define OF_SIZE(SIZE)         \
  FORWARD(f16, __half, SIZE)  \
  BACKWARD(f16, __half, SIZE)
OF_SIZE(64)
OF_SIZE(128)
