// dE, and dC whose rows begin on 16 bytes, of strips of which the last may be narrow.
#include "products_sm90a.cuh"

EMBEDDINGS_PRODUCT(embeddings_gradient_sm90a_bf16, __nv_bfloat16, false)
EMBEDDINGS_PRODUCT(embeddings_gradient_sm90a_f16, __half, false)
EMBEDDINGS_PARTS(embeddings_parts_sm90a, false)
CLASSIFIER_PRODUCT(classifier_gradient_sm90a_bf16, __nv_bfloat16, false, false, false)
CLASSIFIER_PRODUCT(classifier_gradient_sm90a_f16, __half, false, false, false)
CLASSIFIER_PRODUCT(averaged_classifier_gradient_sm90a_bf16, __nv_bfloat16, true, false, false)
CLASSIFIER_PRODUCT(averaged_classifier_gradient_sm90a_f16, __half, true, false, false)
