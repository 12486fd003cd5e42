//! The decoder as a causal language model, which goes on token by token with the keys and values it has.

use super::causal_lm::{head_options, CausalLm, Continuation};
use super::decoder::{Decoder, Remembered};
use super::rope::Rope;
use crate::{LinearCrossEntropy, Options};
use candle_core::{bail, Device, Result, Tensor};

/// Goes on where it was, unless the angles of the tokens so far change with the length.
struct CachedContinuation {
    /// Outside of any graph, and without dropout.
    decoder: Decoder,
    tokens: Vec<u32>,
    remembered: Remembered,
}

impl Continuation for CachedContinuation {
    fn next_token_logits(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let before = self.tokens.len();
        if before + tokens.len() == 0 {
            bail!("no tokens to go on from")
        }
        self.tokens.extend(tokens);
        let logits = self.logits(before);
        if logits.is_err() {
            self.tokens.truncate(before);
            self.remembered = Remembered::default();
        }
        logits
    }
}

impl CachedContinuation {
    /// Of the token after all, of which the first `before` were read already.
    fn logits(&mut self, before: usize) -> Result<Tensor> {
        let decoder = &self.decoder;
        let turns_anew = |rope: &Rope| {
            before > 0 && rope.frequencies_at(before) != rope.frequencies_at(self.tokens.len())
        };
        if self.remembered.time != before || decoder.config().ropes.iter().any(turns_anew) {
            self.remembered = Remembered::default();
        }
        self.remembered
            .layers
            .resize(decoder.config().layers.len(), None);
        let ids = Tensor::new(&self.tokens[self.remembered.time..], &Device::Cpu)?;
        let parts = [(1, ids.dim(0)?)];
        let ids = decoder.checked(&ids)?;
        let states = decoder.states(&ids, &parts, Some(&mut self.remembered))?;
        decoder
            .logits(&states.narrow(0, parts[0].1 - 1, 1)?)?
            .squeeze(0)
    }
}

impl CausalLm for Decoder {
    fn continuation(&self) -> Result<Box<dyn Continuation + '_>> {
        Ok(Box::new(CachedContinuation {
            decoder: self.frozen()?,
            tokens: Vec::new(),
            remembered: Remembered::default(),
        }))
    }

    fn hidden_states(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, time) = ids.dims2()?;
        if batch * time == 0 {
            bail!("no tokens: ids have shape {:?}", ids.dims())
        }
        self.states(&self.checked(ids)?, &[(batch, time)], None)?
            .reshape((batch, time, self.config().hidden_size))
    }

    /// With the head's adapter in it, if it has one: a matrix of the head's size, which [`Decoder`] itself never forms.
    fn head_weight(&self) -> Result<Tensor> {
        match &self.head_adapter {
            None => Ok(self.head.clone()),
            Some(adapter) => adapter.merged(&self.head),
        }
    }

    /// With the head's adapter in its options, if it has one, and the dropout of that by the seed there is now.
    fn head(&self, options: &Options) -> Result<LinearCrossEntropy> {
        let mut options = head_options(options, self.softcap());
        if let Some(adapter) = &self.head_adapter {
            if options.adapter.is_some() {
                bail!("the options have an adapter, and so has the head of this decoder: leave the options' out")
            }
            options = options.adapter(adapter.low_rank(self.dropout_seed()));
        }
        Ok(LinearCrossEntropy::new(self.head.clone(), None, options))
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn softcap(&self) -> Option<f64> {
        self.config().softcap
    }
}
