// What a z-loss makes of a row.
#pragma once

// What z-loss adds to the loss of a row, and what it leaves of the softmax in its gradient.
__device__ __forceinline__ float z_part(float weight, float lse) { return weight == 0.f ? 0.f : weight * lse * lse; }
__device__ __forceinline__ float softmax_share(float weight, float lse) {
  return weight == 0.f ? 1.f : 1.f + 2.f * weight * lse;
}

// Writes a row's loss and lse, and keeps lse in two parts: logits of 1e4 leave f32 three digits behind the point. Of a row
// whose target is no class, loss and maximum are NaN, so that its gradient is NaN too.
template <class Params>
__device__ __forceinline__ void write_row(const Params &p, uint32_t row, float max, float log_sum, const float *target_logit,
                                          bool in_range, bool has_max) {
  const uint32_t position = p.row_position[row];
  const float lse = max + log_sum;
  p.packed[position] = in_range ? (max - *target_logit) + log_sum + z_part(p.z_loss, lse) : NAN;
  p.packed[(int64_t)p.positions + position] = lse;
  p.row_max[row] = has_max ? max : NAN;
  p.row_log_sum[row] = log_sum;
}
