//! The entries of a `config.json`: absent, null, or a value of the type that is wanted.

use candle_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The entries of a JSON object.
pub(super) struct Entries<'a>(pub &'a Map<String, Value>);

impl<'a> Entries<'a> {
    /// The entry, where it is there and not null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The entry, or the default where it is absent. Null is no value.
    pub fn or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::Null) => invalid(format!("{key} is null, expected a value or no entry")),
            Some(value) => parse(key, value),
        }
    }

    /// The entry, or the default where it is absent. Null means none.
    pub fn optional<T: DeserializeOwned>(
        &self,
        key: &str,
        default: Option<T>,
    ) -> Result<Option<T>> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => parse(key, value).map(Some),
        }
    }

    /// A size, which is at least 1.
    pub fn size(&self, key: &str, default: usize) -> Result<usize> {
        positive(key, self.or(key, default)?)
    }

    pub fn optional_size(&self, key: &str, default: Option<usize>) -> Result<Option<usize>> {
        self.optional(key, default)?
            .map(|size| positive(key, size))
            .transpose()
    }

    /// A number above 0.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        positive_number(key, self.or(key, default)?)
    }

    pub fn optional_number(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        self.optional(key, default)?
            .map(|number| positive_number(key, number))
            .transpose()
    }
}

fn parse<T: DeserializeOwned>(key: &str, value: &Value) -> Result<T> {
    T::deserialize(value).or_else(|e| invalid(format!("{key} is {value}: {e}")))
}

fn positive(key: &str, size: usize) -> Result<usize> {
    match size {
        0 => invalid(format!("{key} must be positive, got 0")),
        _ => Ok(size),
    }
}

fn positive_number(key: &str, number: f64) -> Result<f64> {
    match number > 0. && number.is_finite() {
        true => Ok(number),
        false => invalid(format!("{key} must be positive and finite, got {number}")),
    }
}

pub(super) fn invalid<T>(message: String) -> Result<T> {
    Err(Error::Msg(format!("model config: {message}")))
}
