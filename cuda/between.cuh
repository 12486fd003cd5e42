// The form in which chunks of rows leave dC for those that follow.
#pragma once
#include <cstdint>

// dC between two chunks of rows: floats of 16 bits in the place of T, with 3 bits of exponent and 12 of mantissa, in units
// of a power of two that a class has in the columns of a block. So the largest numbers, down to a 64th of the largest of
// all, have 13 digits where bf16 has 8, and what is smaller has their last digit: a sum over many chunks is as good as
// rounded once. Of the power, the biased exponent of the largest number is kept; what is not finite makes all of them NaN.
struct Between {
  static constexpr uint32_t LEAST = 30;     // so that the unit is a normal number,
  static constexpr uint32_t GREATEST = 253;  // and what it is divided by
  static constexpr uint32_t NOT_FINITE = 255;
  static constexpr uint32_t ROUND = 1u << 10;  // half of the last digit that is kept of a float's mantissa
  // A number of exponent 127, that of the largest once it is divided by the unit, times this has exponent 7, the largest of
  // 3 bits; smaller ones become subnormal as they are to be.
  static constexpr float DOWN = 0x1p-120f, UP = 0x1p120f;

  // Of the largest absolute value, as bits: NaN is above all. It is rounded as it will be.
  static __device__ __forceinline__ uint32_t exponent(uint32_t largest) {
    const uint32_t rounded = max((largest + ROUND) >> 23, LEAST);
    return rounded > GREATEST ? NOT_FINITE : rounded;
  }
  static __device__ __forceinline__ float unit(uint32_t exponent) {
    return __uint_as_float(exponent == NOT_FINITE ? 0x7FFFFFFF : exponent << 23);
  }
  static __device__ __forceinline__ float per_unit(uint32_t exponent) {
    return __uint_as_float((254 - min(exponent, GREATEST)) << 23);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word, float unit) {
    const float low = __uint_as_float((word << 11 & 0x03FFF800) | (word << 16 & 0x80000000));
    const float high = __uint_as_float((word >> 5 & 0x03FFF800) | (word & 0x80000000));
    return make_float2(UP * low * unit, UP * high * unit);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high, float per_unit) {
    const uint32_t l = __float_as_uint(per_unit * low * DOWN) + ROUND, h = __float_as_uint(per_unit * high * DOWN) + ROUND;
    return (l >> 11 & 0x7FFF) | (l >> 16 & 0x8000) | (h << 5 & 0x7FFF0000) | (h & 0x80000000);
  }
};
