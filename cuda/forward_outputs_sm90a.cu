// The forward on Hopper with entropy and the likeliest class. A file of its own: a program loads the kernels of those it uses.
#include "forward_sm90a.cuh"

FORWARD(forward_outputs_sm90a_bf16, __nv_bfloat16, false, true)
FORWARD(forward_outputs_sm90a_f16, __half, false, true)
FORWARD(forward_statistics_outputs_sm90a_bf16, __nv_bfloat16, true, true)
FORWARD(forward_statistics_outputs_sm90a_f16, __half, true, true)
