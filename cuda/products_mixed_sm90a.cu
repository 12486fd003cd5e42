// dE, and dC whose rows begin on 16 bytes, of strips of which the last two are narrow. A file of its own: a program loads the
// kernels of those it uses.
#include "products_sm90a.cuh"

EMBEDDINGS_PRODUCT(mixed_embeddings_gradient_sm90a_bf16, __nv_bfloat16, true)
EMBEDDINGS_PRODUCT(mixed_embeddings_gradient_sm90a_f16, __half, true)
EMBEDDINGS_PARTS(mixed_embeddings_parts_sm90a, true)
CLASSIFIER_PRODUCT(mixed_classifier_gradient_sm90a_bf16, __nv_bfloat16, false, true, false)
CLASSIFIER_PRODUCT(mixed_classifier_gradient_sm90a_f16, __half, false, true, false)
CLASSIFIER_PRODUCT(mixed_averaged_classifier_gradient_sm90a_bf16, __nv_bfloat16, true, true, false)
CLASSIFIER_PRODUCT(mixed_averaged_classifier_gradient_sm90a_f16, __half, true, true, false)
