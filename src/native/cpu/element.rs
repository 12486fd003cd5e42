//! The numbers of the CPU implementation: what inputs are stored in, what is computed in.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// What products, sums and the softmax are computed in.
pub(crate) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + Neg<Output = Self>
{
    const ONE: Self;
    /// Not above any logit but -inf, and finite: a tile whose every logit is -inf stays without a NaN.
    const LOWEST: Self;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    /// Written so that a loop over it becomes vector instructions.
    fn exp(self) -> Self;
    /// Written so that a loop over it becomes vector instructions.
    fn tanh(self) -> Self;
}

impl Real for f32 {
    const ONE: Self = 1.;
    const LOWEST: Self = f32::MIN;

    fn from_f64(x: f64) -> Self {
        x as f32
    }

    fn to_f64(self) -> f64 {
        self as f64
    }

    /// Within 2 ulp (Cephes' expf) up to 88; 0 below the smallest normal number.
    #[inline(always)]
    fn exp(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 rounds to an integer, which also lies in the low bits of
        // the sum.
        const ROUND: f32 = 12582912.;
        // ln 2 in two parts, so that the reduction loses no bits.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let shifted = self * std::f32::consts::LOG2_E + ROUND;
        let power = shifted - ROUND;
        let r = self - power * LN2_HIGH - power * LN2_LOW;
        let p = 1.987_569_1e-4;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 5e-1;
        let p = p * (r * r) + r + 1.;
        let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        let result = p * scale;
        // A NaN fails both comparisons and has come through the polynomial.
        if self < -87.336_55 {
            0.
        } else if self > 88. {
            f32::INFINITY
        } else {
            result
        }
    }

    /// Within 2 ulp (Cephes' tanhf).
    #[inline(always)]
    fn tanh(self) -> Self {
        let size = self.abs();
        let square = self * self;
        let p = -5.704_988_7e-3;
        let p = p * square + 2.063_909e-2;
        let p = p * square - 5.373_971_6e-2;
        let p = p * square + 1.333_144_2e-1;
        let p = p * square - 3.333_328e-1;
        let small = p * square * self + self;
        let large = (1. - 2. / (Real::exp(size + size) + 1.)).copysign(self);
        if size < 0.625 {
            small
        } else {
            large
        }
    }
}

impl Real for f64 {
    const ONE: Self = 1.;
    const LOWEST: Self = f64::MIN;

    fn from_f64(x: f64) -> Self {
        x
    }

    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
}

/// What inputs and gradients are stored in.
pub(crate) trait Element: WithDType {
    type Real: Real;

    fn widen(from: &[Self], to: &mut [Self::Real]);
    fn narrow(from: &[Self::Real], to: &mut [Self]);
    /// The slice itself where it is already of the type that is computed in.
    fn as_real(slice: &[Self]) -> Option<&[Self::Real]>;
    /// Whether [`Element::as_real`] gives something.
    const REAL: bool;
    /// A gradient of this type has the exponents to be formed before it is scaled.
    const SCALES_EXACTLY: bool = true;
    /// The vector itself where it is already of the type that is computed in, else rounded.
    fn from_real(values: Vec<Self::Real>) -> Vec<Self>;
}

macro_rules! real_element {
    ($t:ty) => {
        impl Element for $t {
            type Real = $t;
            const REAL: bool = true;

            fn widen(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from)
            }

            fn narrow(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from)
            }

            fn as_real(slice: &[Self]) -> Option<&[Self]> {
                Some(slice)
            }

            fn from_real(values: Vec<Self>) -> Vec<Self> {
                values
            }
        }
    };
}

macro_rules! half_element {
    ($t:ty, $scales_exactly:expr) => {
        impl Element for $t {
            type Real = f32;
            const REAL: bool = false;
            const SCALES_EXACTLY: bool = $scales_exactly;

            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to)
            }

            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from)
            }

            fn as_real(_: &[Self]) -> Option<&[f32]> {
                None
            }

            fn from_real(values: Vec<f32>) -> Vec<Self> {
                let mut narrow = vec![<$t>::ZERO; values.len()];
                Self::narrow(&values, &mut narrow);
                narrow
            }
        }
    };
}

real_element!(f32);
real_element!(f64);
half_element!(bf16, true);
// Its exponents reach down to 2^-24 only: the user's loss scale has to be in the gradient first.
half_element!(f16, false);

#[cfg(test)]
mod tests {
    use super::Real;

    fn ulps(x: f32, exact: f64) -> f64 {
        let ulp = f32::from_bits((exact as f32).abs().to_bits() + 1) - (exact as f32).abs();
        (x as f64 - exact).abs() / ulp as f64
    }

    #[test]
    fn exp_and_tanh_are_within_two_ulp() {
        let mut x = -87.;
        while x < 88. {
            let off = ulps(Real::exp(x), (x as f64).exp());
            assert!(off <= 2., "exp({x}) is off by {off} ulp");
            let off = ulps(Real::tanh(x), (x as f64).tanh());
            assert!(off <= 2., "tanh({x}) is off by {off} ulp");
            x += 0.000_37;
        }
    }

    #[test]
    fn exp_and_tanh_keep_their_limits() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.);
        assert_eq!(Real::exp(-1e4f32), 0.);
        assert_eq!(Real::exp(0f32), 1.);
        assert_eq!(Real::exp(1e4f32), f32::INFINITY);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::tanh(f32::NEG_INFINITY), -1.);
        assert_eq!(Real::tanh(1e4f32), 1.);
        assert_eq!(Real::tanh(0f32), 0.);
        assert!(Real::tanh(f32::NAN).is_nan());
    }
}
