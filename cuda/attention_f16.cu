// Attention of f16 numbers. A file a dtype: a program loads the kernels of the one it uses.
#include "attention_backward.cuh"
#include "attention_forward.cuh"

#define OF_SIZE(SIZE)      \
  FORWARD(f16, __half, SIZE)    \
  BACKWARD(f16, __half, SIZE)
OF_SIZE(64)
OF_SIZE(96)
OF_SIZE(128)
OF_SIZE(256)
DELTA(f16, __half)
