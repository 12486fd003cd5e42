//! What attention is asked for, and which keys and queries see each other.

use crate::ops::check_alike;
use candle_core::{bail, Result, Tensor};
use std::ops::Range;

/// What a query sees and how it is scored. The default is every key, `1 / sqrt(head_dim)`, no softcap.
///
/// ```
/// use candle_cut_cross_entropy::ops::AttentionOptions;
/// let options = AttentionOptions { causal: true, ..AttentionOptions::default() };
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AttentionOptions {
    /// Whether a query sees no key after its own position. The queries are the last of the keys' positions: query `i` of
    /// `T` is at position `i + S - T` of `S`.
    pub causal: bool,
    /// What products of queries and keys are multiplied by; `None` for `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// A score `z` becomes `softcap * tanh(z / softcap)`, as in Gemma 2.
    pub softcap: Option<f64>,
    /// How many keys a query sees at most: its own position's and those before. Needs `causal`.
    pub window: Option<usize>,
}

pub(super) const NAME: &str = "attention";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub causal: bool,
    pub scale: f64,
    pub softcap: Option<f64>,
    pub window: Option<usize>,
}

impl Settings {
    pub(super) fn new(options: &AttentionOptions, sizes: &Sizes) -> Result<Self> {
        let &AttentionOptions {
            causal,
            scale,
            softcap,
            window,
        } = options;
        if sizes.head_dim == 0 {
            bail!("{NAME}: heads of 0 dimensions")
        }
        let scale = scale.unwrap_or(1. / (sizes.head_dim as f64).sqrt());
        if !(scale > 0. && scale.is_finite()) {
            bail!("{NAME}: the scale must be positive and finite, got {scale}")
        }
        if let Some(softcap) = softcap.filter(|softcap| !(*softcap > 0. && softcap.is_finite())) {
            bail!("{NAME}: the softcap must be positive and finite, got {softcap}")
        }
        match window {
            Some(0) => bail!("{NAME}: with a window of 0 no key is seen"),
            Some(window) if !causal => {
                bail!("{NAME}: a window ({window}) is of the keys up to a position: it needs `causal`")
            }
            _ => {}
        }
        if causal && sizes.queries > sizes.keys {
            bail!(
                "{NAME}: of {} queries and {} keys with `causal`, the first queries see no key",
                sizes.queries,
                sizes.keys
            )
        }
        Ok(Self {
            causal,
            scale,
            softcap,
            window,
        })
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
}

impl Sizes {
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        check_alike(NAME, q, &[("k", k), ("v", v)])?;
        match (q.dims(), k.dims()) {
            (&[batch, queries, heads, head_dim], &[of_keys, keys, key_heads, key_dim])
                if batch == of_keys
                    && head_dim == key_dim
                    && keys > 0
                    && key_heads > 0
                    && heads % key_heads == 0
                    && k.dims() == v.dims() =>
            {
                Ok(Self {
                    batch,
                    queries,
                    keys,
                    heads,
                    key_heads,
                    head_dim,
                })
            }
            _ => bail!(
                "{NAME}: expected q (batch, T, heads, head_dim), k and v (batch, S, key_value_heads, head_dim) with heads a multiple of key_value_heads, got {:?}, {:?} and {:?}",
                q.dims(),
                k.dims(),
                v.dims()
            ),
        }
    }

    /// Query heads that share a head of keys.
    pub fn group(&self) -> usize {
        self.heads / self.key_heads
    }

    /// The keys that some of these queries see; of one query, all of them.
    pub fn keys_of(&self, queries: Range<usize>, settings: &Settings) -> Range<usize> {
        if !settings.causal {
            return 0..self.keys;
        }
        let offset = self.keys - self.queries;
        let first = match settings.window {
            Some(window) => (queries.start + offset + 1).saturating_sub(window),
            None => 0,
        };
        first..(queries.end + offset).min(self.keys)
    }

    /// The queries that see some of these keys.
    pub fn queries_of(&self, keys: Range<usize>, settings: &Settings) -> Range<usize> {
        if !settings.causal {
            return 0..self.queries;
        }
        let offset = self.keys - self.queries;
        let end = match settings.window {
            Some(window) => keys.end.saturating_add(window - 1).saturating_sub(offset),
            None => self.queries,
        };
        let end = end.min(self.queries);
        keys.start.saturating_sub(offset).min(end)..end
    }
}

#[cfg(test)]
mod tests {
    use super::{Settings, Sizes};

    #[test]
    fn ranges_hold_what_is_seen_and_nothing_more() {
        for (queries, keys) in [(1, 1), (7, 7), (5, 9)] {
            for window in [None, Some(1), Some(3), Some(100), Some(usize::MAX)] {
                let settings = Settings {
                    causal: true,
                    scale: 1.,
                    softcap: None,
                    window,
                };
                let sizes = Sizes {
                    batch: 1,
                    queries,
                    keys,
                    heads: 1,
                    key_heads: 1,
                    head_dim: 1,
                };
                let sees = |query: usize, key: usize| {
                    let position = query + keys - queries;
                    key <= position && position - key < window.unwrap_or(usize::MAX)
                };
                for query in 0..queries {
                    let seen: Vec<usize> = (0..keys).filter(|key| sees(query, *key)).collect();
                    let range: Vec<usize> = sizes.keys_of(query..query + 1, &settings).collect();
                    assert_eq!(
                        range, seen,
                        "query {query} of {queries}, {keys}, {window:?}"
                    );
                }
                for key in 0..keys {
                    let seen: Vec<usize> = (0..queries).filter(|query| sees(*query, key)).collect();
                    let range: Vec<usize> = sizes.queries_of(key..key + 1, &settings).collect();
                    assert_eq!(range, seen, "key {key} of {queries}, {keys}, {window:?}");
                }
            }
        }
    }
}
