// What every kernel of the loss shares: element types, the tile size of the gradient filter, softcap.
//
// Names are those of the Rust side: embeddings E (rows, D), classifier C (V, D), bias (V), targets.
// "Row" is the index of a position that counts, after compaction; `row_embedding` leads from it to a row
// of E. How many rows there are is known on the device only: kernels are launched for an upper bound.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Rows by classes of a tile of the gradient of the logits that is kept or skipped as a whole.
constexpr int TILE = 128;
constexpr uint8_t KEEP_FOR_EMBEDDINGS = 1;
constexpr uint8_t KEEP_FOR_CLASSIFIER = 2;

// Stands for "no class here". Finite, so that a block of nothing but such columns has no NaN.
constexpr float MASKED = -1e30f;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// exp(x) by the hardware's 2^x: 2 ulp, 0 for -inf, NaN for NaN.
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * LOG2E));
  return y;
}

// tanh(x), relative error below 1e-6. By exp it has no overflow that matters: that reaches inf or 0 and the quotient
// 0 or 2. Near 0, where it would cancel, by its series.
__device__ __forceinline__ float fast_tanh(float x) {
  const float by_exp = 1.f - __fdividef(2.f, 1.f + fast_exp(2.f * x));
  const float s = x * x;
  const float by_series = x * (1.f + s * (-1.f / 3 + s * (2.f / 15 - s * (17.f / 315))));
  return s < 0.04f ? by_series : by_exp;
}

// A running maximum and the sum of exponentials relative to it.
struct MaxSum {
  float max = MASKED, sum = 0.f;

  __device__ __forceinline__ void merge(float other_max, float other_sum) {
    const float larger = fmaxf(max, other_max);
    sum = sum * fast_exp(max - larger) + other_sum * fast_exp(other_max - larger);
    max = larger;
  }
};

// A logit as bf16, rounded towards +inf: the filter may only err on the side of keeping a tile.
__device__ __forceinline__ __nv_bfloat16 round_up(float x) { return __float2bfloat16_ru(x); }
