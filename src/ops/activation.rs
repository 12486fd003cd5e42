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
                // Far beyond where tanh is 1: the square of a larger number may be infinite.
                let far = cpu::real::<R>(1e4);
                let near = if x > far {
                    far
                } else if x < -far {
                    -far
                } else {
                    x
                };
                let inner = factor * (one + three * cubic * near * near);
                let slope = half * (one + tanh) + half * x * (one - tanh * tanh) * inner;
                (half * x * (one + tanh), slope)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Activation;

    #[test]
    fn slopes_of_huge_numbers_are_numbers() {
        for x in [1e20f32, 1e38] {
            assert_eq!(Activation::GeluTanh.at(x), (x, 1.));
            assert_eq!(Activation::GeluTanh.at(-x), (0., 0.));
        }
    }
}
