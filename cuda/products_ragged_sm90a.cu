// dC of any number of columns. A file of its own: a program loads the kernels of those it uses.
#include "products_sm90a.cuh"

CLASSIFIER_PRODUCT(ragged_classifier_gradient_sm90a_bf16, __nv_bfloat16, false, true, true)
CLASSIFIER_PRODUCT(ragged_classifier_gradient_sm90a_f16, __half, false, true, true)
CLASSIFIER_PRODUCT(ragged_averaged_classifier_gradient_sm90a_bf16, __nv_bfloat16, true, true, true)
CLASSIFIER_PRODUCT(ragged_averaged_classifier_gradient_sm90a_f16, __half, true, true, true)
