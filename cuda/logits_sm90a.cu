// Logits on Hopper, to be stored. A file of its own: a program loads the kernels of those it uses.
#include "gradient_sm90a.cuh"

GRADIENT(logits_sm90a_bf16, __nv_bfloat16, Tile::Logits)
