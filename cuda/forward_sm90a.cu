// The forward on Hopper.
#include "forward_sm90a.cuh"

FORWARD(forward_sm90a_bf16, __nv_bfloat16, false, false)
FORWARD(forward_sm90a_f16, __half, false, false)
FORWARD(forward_statistics_sm90a_bf16, __nv_bfloat16, true, false)
FORWARD(forward_statistics_sm90a_f16, __half, true, false)
