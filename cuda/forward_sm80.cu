// The forward on compute capability 8.0 and later.
#include "forward_sm80.cuh"

FORWARD(forward_sm80_bf16, __nv_bfloat16, 256, false)
FORWARD(forward_sm80_f16, __half, 256, false)
FORWARD(forward_sm80_f32, float, 128, false)
