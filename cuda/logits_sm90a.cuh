// From products to logits, in the registers of a consumer group: what the forward and the gradient tiles must do
// alike, so that both see the same logits.
#pragma once
#include "hopper.cuh"

namespace hopper {

// The group's threads put the bias of a tile into shared memory as f32, 0 past the last class.
template <int N, typename T>
__device__ __forceinline__ void stage_bias(float (&to)[N], const T* bias, int group, uint32_t first_class,
                                           uint32_t classes) {
  named_wait(BIAS + group, GROUP);  // the last tile's bias has been read
  for (uint32_t i = threadIdx.x % GROUP; i < N; i += GROUP)
    to[i] = first_class + i < classes ? to_float(bias[first_class + i]) : 0.0f;
  named_wait(BIAS + group, GROUP);
}

constexpr float LARGE_CAP = 64.0f;

// The lowest exponent that an exponential is multiplied by: 2^ of it is 0, and it is finite.
constexpr float LEAST_LOG2 = -200.0f;

// Adds the bias (null: none), multiplies by the scale and applies the softcap (<= 0: none).
template <int R>
__device__ __forceinline__ void finish_logits(float (&z)[2][R], const float* bias, float scale, float softcap) {
  const int lane_column = threadIdx.x % 4 * 2;
  if (bias) {
#pragma unroll
    for (int j = 0; j < R / 4; ++j) {
      float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + lane_column);
#pragma unroll
      for (int s = 0; s < 4; ++s) z[s / 2][4 * j + 2 * (s % 2)] += b.x, z[s / 2][4 * j + 2 * (s % 2) + 1] += b.y;
    }
  }
  if (scale != 1.0f) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < R; ++i) z[half][i] *= scale;
  }
  if (softcap > 0.0f) {
    // cap tanh(z / cap) = cap - 2 cap / (1 + exp(2 z / cap)): one ex2, one rcp, to 1e-7 of the cap; exact at
    // +-infinity. That is too much of a small logit under a large cap, where tanh is its series.
    const float rate = 2.0f * LOG2E / softcap, twice = -2.0f * softcap;
    const bool large = softcap > LARGE_CAP;
    const float inverse_cap = 1.0f / softcap;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < R; ++i) {
        float& logit = z[half][i];
        const float by_exp = fmaf(twice, reciprocal(1.0f + exp2_fast(logit * rate)), softcap);
        if (large) {
          const float part = logit * inverse_cap, s = part * part;
          const float by_series = logit * fmaf(s, fmaf(s, fmaf(s, -17.0f / 315, 2.0f / 15), -1.0f / 3), 1.0f);
          logit = s < 0.04f ? by_series : by_exp;
        } else {
          logit = by_exp;
        }
      }
  }
}

// -inf past the last class; after the softcap, which would lift it.
template <int N>
__device__ __forceinline__ void mask_logits(float (&z)[2][N / 2], uint32_t first_class, uint32_t classes) {
  if (first_class + N <= classes) return;
  const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if (first_class + i / 4 * 8 + lane_column + i % 2 >= classes) z[half][i] = -INFINITY;
}

}  // namespace hopper
