// Gradient tiles on Hopper of a loss that has the entropy in it. A file of its own: a program loads the kernels of those it uses.
#include "gradient_sm90a.cuh"

GRADIENT(entropy_gradient_sm90a_bf16, __nv_bfloat16, Tile::EntropyGradient)
GRADIENT(entropy_gradient_sm90a_f16, __half, Tile::EntropyGradient)
