// The forward on compute capability 8.0 and later with entropy and the likeliest class. A file of its own: a program loads the kernels of those it uses.
#include "forward_sm80.cuh"

FORWARD(forward_outputs_sm80_bf16, __nv_bfloat16, 256, true)
FORWARD(forward_outputs_sm80_f16, __half, 256, true)
FORWARD(forward_outputs_sm80_f32, float, 128, true)
