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
constexpr int ONE_BLOCK = 1024;  // threads of the kernels that are one block
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

// The lowest exponent that an exponential is multiplied by: exp of it is 0, and it is finite.
constexpr float LEAST_EXPONENT = -200.f;

// The same with what entropy and the likeliest class need: the sum of exp(z - max) (z - max), and the lowest class that
// has the maximum.
struct RowSum : MaxSum {
  float weighted = 0.f;
  uint32_t best = 0;

  __device__ __forceinline__ void merge(float other_max, float other_sum, float other_weighted, uint32_t other_best) {
    const float larger = fmaxf(max, other_max);
    // Finite, so that a part of no logits adds 0.
    const float less = fmaxf(max - larger, LEAST_EXPONENT);
    const float other_less = fmaxf(other_max - larger, LEAST_EXPONENT);
    weighted = (weighted + less * sum) * fast_exp(less) + (other_weighted + other_less * other_sum) * fast_exp(other_less);
    if (other_max > max)
      best = other_best;
    else if (other_max == max)
      best = min(best, other_best);
    MaxSum::merge(other_max, other_sum);
  }
};

// What the filter wants to know of a row's logits in a tile of classes, its target's left out: the largest logit, and
// the sum of exp(z - largest), each term by the softcap's derivative. Two bf16 numbers for half-precision inputs; there
// the largest is rounded towards +inf, for the filter may only err on the side of keeping a tile.
template <typename T> struct TileStatistics {
  uint32_t packed;

  static __device__ __forceinline__ TileStatistics pack(float max, float sum) {
    const __nv_bfloat16 largest = __float2bfloat16_ru(max);
    const float rescaled = sum * fast_exp(max - __bfloat162float(largest));
    const uint32_t high = __bfloat16_as_ushort(__float2bfloat16_rn(rescaled));
    return {high << 16 | __bfloat16_as_ushort(largest)};
  }
  __device__ __forceinline__ float2 unpack() const {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  }
};
template <> struct TileStatistics<float> {
  float max, sum;

  static __device__ __forceinline__ TileStatistics pack(float max, float sum) { return {max, sum}; }
  __device__ __forceinline__ float2 unpack() const { return make_float2(max, sum); }
};

// Reduces over a block of THREADS threads, in a fixed order; every thread gets the result.
template <int THREADS, typename N, class Combine> __device__ N block_reduce(N value, Combine combine) {
  __shared__ N parts[32];
  static_assert(THREADS == 1024, "a warp of parts");
  for (int i = 16; i; i >>= 1) value = combine(value, __shfl_xor_sync(0xffffffff, value, i));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[threadIdx.x & 31];
  for (int i = 16; i; i >>= 1) value = combine(value, __shfl_xor_sync(0xffffffff, value, i));
  return value;
}
