// What a z-loss makes of a row.
#pragma once

// What z-loss adds to the loss of a row, and what it leaves of the softmax in its gradient.
__device__ __forceinline__ float z_part(float weight, float lse) { return weight == 0.f ? 0.f : weight * lse * lse; }
__device__ __forceinline__ float softmax_share(float weight, float lse) {
  return weight == 0.f ? 1.f : 1.f + 2.f * weight * lse;
}
