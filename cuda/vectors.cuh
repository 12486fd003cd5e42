// Numbers of a row, several at once: what the operations around the products read and write.
#pragma once
#include "common.cuh"

// N consecutive numbers, one access.
template <typename T, int N> struct alignas(N * sizeof(T)) Numbers {
  T value[N];

  static __device__ __forceinline__ Numbers load(const T *from) { return *reinterpret_cast<const Numbers *>(from); }
  __device__ __forceinline__ void store(T *to) const { *reinterpret_cast<Numbers *>(to) = *this; }
  __device__ __forceinline__ float get(int i) const { return to_float(value[i]); }
  __device__ __forceinline__ void set(int i, float x) { value[i] = from_float<T>(x); }
};

// The numbers of an access: 16 bytes of them where every row begins on 16 bytes.
template <typename T, bool ALIGNED> constexpr int WIDTH = ALIGNED ? 16 / (int)sizeof(T) : 1;

// In a fixed order; every lane gets the sum.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}

// A kernel of each dtype, in a form for rows that begin on 16 bytes and one for others.
#define FOR_DTYPE(KERNEL, FUNCTION, PARAMS, THREADS, SUFFIX, T)                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) KERNEL##_##SUFFIX(const PARAMS p) {           \
    if (p.aligned)                                                                                     \
      FUNCTION<T, WIDTH<T, true>>(p);                                                                  \
    else                                                                                               \
      FUNCTION<T, WIDTH<T, false>>(p);                                                                 \
  }
#define FOR_DTYPES(KERNEL, FUNCTION, PARAMS, THREADS)                  \
  FOR_DTYPE(KERNEL, FUNCTION, PARAMS, THREADS, bf16, __nv_bfloat16)    \
  FOR_DTYPE(KERNEL, FUNCTION, PARAMS, THREADS, f16, __half)            \
  FOR_DTYPE(KERNEL, FUNCTION, PARAMS, THREADS, f32, float)
