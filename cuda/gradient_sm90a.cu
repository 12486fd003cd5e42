// Gradient tiles on Hopper.
#include "gradient_sm90a.cuh"

GRADIENT(gradient_sm90a_bf16, __nv_bfloat16, Tile::Gradient)
GRADIENT(gradient_sm90a_f16, __half, Tile::Gradient)
// f16 has no range for what is measured from a logit that may be far from lse.
GRADIENT(probabilities_sm90a_bf16, __nv_bfloat16, Tile::Probabilities)
