// Gradient tiles on Hopper where entropy or the likeliest class is asked for. A file of its own: a program loads the kernels
// of those it uses.
#include "gradient_sm90a.cuh"

GRADIENT(entropy_gradient_sm90a_bf16, __nv_bfloat16, Tile::EntropyGradient)
GRADIENT(entropy_gradient_sm90a_f16, __half, Tile::EntropyGradient)
GRADIENT(probabilities_outputs_sm90a_bf16, __nv_bfloat16, Tile::ProbabilitiesAndOutputs)
GRADIENT(probabilities_outputs_sm90a_f16, __half, Tile::ProbabilitiesAndOutputs)
