//! Sets of options by name.

use candle_core::{bail, Error, Result};
use std::str::FromStr;

/// The names users know from the reference implementation.
///
/// Every implementation here accumulates gradients in f32 (f64 for f64 inputs), so the presets
/// differ only in what they filter, and `cce` and `cce_kahan` are the same thing.
///
/// ```
/// use candle_cut_cross_entropy::{Options, Preset};
///
/// # fn main() -> candle_core::Result<()> {
/// let preset: Preset = "cce_kahan_full_c".parse()?;
/// let options = Options::preset(preset);
/// # let _ = options;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preset {
    /// Filters both gradients: the default.
    #[default]
    Cce,
    /// The same as [`Preset::Cce`].
    CceKahan,
    /// Filters the gradient of the embeddings only; the reference's choice for pretraining.
    CceKahanFullC,
    /// Filters the gradient of the classifier only.
    CceKahanFullE,
    /// Filters nothing. Also known as `cce_kahan_full_c_full_e`.
    CceExact,
    /// [`Implementation::Native`](crate::Implementation::Native) with nothing filtered.
    Native,
}

impl Preset {
    /// Every preset, in the order of their names in the documentation.
    pub const ALL: [Preset; 6] = [
        Preset::Cce,
        Preset::CceKahan,
        Preset::CceKahanFullC,
        Preset::CceKahanFullE,
        Preset::CceExact,
        Preset::Native,
    ];

    /// The name on command lines and in tables, such as `cce_exact`.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Cce => "cce",
            Preset::CceKahan => "cce_kahan",
            Preset::CceKahanFullC => "cce_kahan_full_c",
            Preset::CceKahanFullE => "cce_kahan_full_e",
            Preset::CceExact => "cce_exact",
            Preset::Native => "native",
        }
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "cce_kahan_full_c_full_e" {
            return Ok(Preset::CceExact);
        }
        match Preset::ALL.into_iter().find(|p| p.name() == name) {
            Some(preset) => Ok(preset),
            None => bail!(
                "unknown preset {name:?}, expected one of {}",
                Preset::ALL.map(Preset::name).join(", ")
            ),
        }
    }
}
