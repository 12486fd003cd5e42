//! The activations of gates.

use super::cpu::{self, Number};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    Silu,
    GeluTanh,
}

impl Activation {
    pub fn name(self) -> &'static str {
        match self {
            Activation::Silu => "swiglu",
            Activation::GeluTanh => "geglu",
        }
    }

    /// The activation and its derivative.
    #[inline(always)]
    pub fn at<R: Number>(self, x: R) -> (R, R) {
        let one = R::ONE;
        match self {
            Activation::Silu => {
                let sigmoid = one / (one + (-x).exp());
                (x * sigmoid, sigmoid * (one + x * (one - sigmoid)))
            }
            Activation::GeluTanh => {
                let factor = cpu::real::<R>((2. / std::f64::consts::PI).sqrt());
                let (cubic, half) = (cpu::real::<R>(0.044715), cpu::real::<R>(0.5));
                let three = cpu::real::<R>(3.);
                let tanh = (factor * x * (one + cubic * x * x)).tanh();
                let inner = factor * (one + three * cubic * x * x);
                let slope = half * (one + tanh) + half * x * (one - tanh * tanh) * inner;
                (half * x * (one + tanh), slope)
            }
        }
    }
}
