// Gradient tiles on Hopper.
#include "gradient_sm90a.cuh"

GRADIENT(gradient_sm90a_bf16, __nv_bfloat16, Tile::Gradient)
GRADIENT(gradient_sm90a_f16, __half, Tile::Gradient)
GRADIENT(probabilities_sm90a_bf16, __nv_bfloat16, Tile::Probabilities)
GRADIENT(probabilities_sm90a_f16, __half, Tile::Probabilities)
