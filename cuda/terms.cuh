// What the loss of a row is made of.
#pragma once
#include "common.cuh"

// The least probability of all unnamed classes, in the derivative of its logarithm.
constexpr float LEAST_REST = 1e-6f;

// The factors of a row's nll, of its lse, of the square of its lse and of its entropy; and, in the gradient alone, of
// -log(1 - S) where S = exp(named - lse).
struct Terms {
  float nll, lse, square, rest, named, entropy;

  __device__ __forceinline__ float loss(float nll_, float lse_, float entropy_) const {
    // What is left out makes no NaN of what is infinite.
    float loss = 0.f;
    if (nll != 0.f) loss += nll * nll_;
    if (lse != 0.f) loss += lse * lse_;
    if (square != 0.f) loss += square * lse_ * lse_;
    if (entropy != 0.f) loss += entropy * entropy_;
    return loss;
  }
  // What the softmax has in the gradient of the loss, the entropy's apart. The one-hot has `nll`.
  __device__ __forceinline__ float softmax(float lse_) const {
    float factor = nll + lse;
    if (square != 0.f) factor += 2.f * square * lse_;
    if (rest != 0.f) {
      const float named_share = expf(named - lse_);
      factor -= rest * named_share / fmaxf(1.f - named_share, LEAST_REST);
    }
    return factor;
  }
};

struct TermsParams {
  const float *of_positions;  // (6, positions): the terms of each, or null: all have those below
  const float *total;         // what the mean divides by, or null: how many rows there are
  float nll, lse, square, entropy;
};

__device__ __forceinline__ Terms terms_of(const TermsParams &p, uint32_t position, uint32_t positions) {
  if (!p.of_positions) return {p.nll, p.lse, p.square, 0.f, 0.f, p.entropy};
  const auto of = [&](int64_t term) { return p.of_positions[term * positions + position]; };
  return {of(0), of(1), of(2), of(3), of(4), of(5)};
}

// What the mean divides the sum of the losses by: 1 for 0.
__device__ __forceinline__ float mean_divisor(const TermsParams &p, uint32_t count) {
  const float total = p.total ? *p.total : (float)count;
  return total != 0.f ? total : 1.f;
}

// Writes a row's loss and lse, and keeps lse in two parts: logits of 1e4 leave f32 three digits behind the point. Of a row
// whose target is no class, loss and maximum are NaN, so that its gradient is NaN too. `entropy` is read where the loss has
// it.
template <class Params>
__device__ __forceinline__ void write_row(const Params &p, uint32_t row, float max, float log_sum, const float *target_logit,
                                          float entropy, bool in_range, bool has_max) {
  const uint32_t position = p.row_position[row];
  const float lse = max + log_sum;
  const Terms terms = terms_of(p.terms, position, p.positions);
  p.packed[position] = in_range ? terms.loss((max - *target_logit) + log_sum, lse, entropy) : NAN;
  p.packed[(int64_t)p.positions + position] = lse;
  p.row_max[row] = has_max ? max : NAN;
  p.row_log_sum[row] = log_sum;
}
