//! What a decoder's weights and adapters are taken from.

use super::adapter::{Adapter, Adapters};
use super::config::Config;
use candle_core::{Device, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Loads, or creates, tensors and keeps their names.
#[derive(Clone)]
pub(super) struct Loader<'a> {
    vb: VarBuilder<'a>,
    deviation: f64,
    adapters: &'a Adapters<'a>,
    loaded: Rc<RefCell<Loaded>>,
}

/// What a loader has loaded: weights by their names, adapters by those of their modules.
#[derive(Debug, Clone, Default)]
pub(super) struct Loaded {
    pub tensors: BTreeMap<String, Tensor>,
    pub adapters: BTreeMap<String, Adapter>,
}

impl<'a> Loader<'a> {
    pub fn new(vb: VarBuilder<'a>, config: &Config, adapters: &'a Adapters<'a>) -> Self {
        Self {
            vb,
            deviation: config.initializer_range,
            adapters,
            loaded: Rc::default(),
        }
    }

    pub fn device(&self) -> &Device {
        self.vb.device()
    }

    pub fn pp(&self, name: impl ToString) -> Self {
        Self {
            vb: self.vb.pp(name),
            ..self.clone()
        }
    }

    /// A matrix whose new values are small random numbers.
    pub fn matrix(&self, shape: (usize, usize), name: &str) -> Result<Tensor> {
        let init = Init::Randn {
            mean: 0.,
            stdev: self.deviation,
        };
        self.get(shape, name, init)
    }

    /// A vector whose new values are this one.
    pub fn vector(&self, len: usize, name: &str, value: f64) -> Result<Tensor> {
        self.get(len, name, Init::Const(value))
    }

    fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        let tensor = self.vb.get_with_hints(shape, name, init)?;
        let full_name = match self.vb.prefix() {
            prefix if prefix.is_empty() => name.to_owned(),
            prefix => format!("{prefix}.{name}"),
        };
        let mut loaded = self.loaded.borrow_mut();
        loaded.tensors.insert(full_name, tensor.clone());
        Ok(tensor)
    }

    /// The adapter of this module, if it has one.
    pub fn adapter(&self, inputs: usize, outputs: usize) -> Result<Option<Adapter>> {
        let module = self.vb.prefix();
        let Some(mut adapter) = (self.adapters)(&module, inputs, outputs)? else {
            return Ok(None);
        };
        let mut loaded = self.loaded.borrow_mut();
        adapter.number = loaded.adapters.len();
        loaded.adapters.insert(module, adapter.clone());
        Ok(Some(adapter))
    }

    pub fn loaded(&self) -> Loaded {
        self.loaded.borrow().clone()
    }
}
