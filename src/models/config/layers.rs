//! What differs from layer to layer: windows and rotary embeddings.

use super::family::Family;
use crate::models::entries::{invalid, Entries};
use crate::models::rope::{Parameters, Rope};
use candle_core::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

/// The window of each layer, `None` where a layer sees everything before it.
pub(super) fn windows(family: Family, entries: &Entries, n: usize) -> Result<Vec<Option<usize>>> {
    let default = family.defaults().sliding_window;
    let window = match family {
        Family::Llama | Family::Gemma | Family::Granite => None,
        Family::Qwen2 | Family::Qwen3 | Family::SmolLm3
            if !entries.or("use_sliding_window", false)? =>
        {
            None
        }
        _ => entries.optional_size("sliding_window", default)?,
    };
    let own: Vec<bool> = match family {
        Family::Llama | Family::Mistral | Family::Phi3 | Family::Gemma | Family::Granite => {
            vec![window.is_some(); n]
        }
        Family::SmolLm3 => {
            let turned = turned(family, entries, n)?;
            turned.iter().map(|t| window.is_some() && !t).collect()
        }
        Family::Qwen2 | Family::Qwen3 => {
            let first = entries.or("max_window_layers", 28)?;
            (0..n).map(|i| window.is_some() && i >= first).collect()
        }
        Family::Gemma2 => alternating(n, 2),
        Family::Gemma3 => alternating(n, entries.size("sliding_window_pattern", 6)?),
    };
    let sliding = match entries.optional::<Vec<String>>("layer_types", None)? {
        None => own,
        Some(types) => {
            let named = layer_types(&types, n)?;
            let fixed = matches!(
                family,
                Family::Llama | Family::Mistral | Family::Phi3 | Family::Gemma | Family::Granite
            );
            if fixed && named != own {
                return invalid(format!(
                    "layer_types of {family} differ from its layers, which are all {}",
                    if window.is_some() { SLIDING } else { FULL }
                ));
            }
            named
        }
    };
    if window.is_none() && sliding.contains(&true) {
        return invalid(format!(
            "layers of type {SLIDING} need a sliding_window (in Qwen and SmolLM 3 also use_sliding_window)"
        ));
    }
    let window = |sliding: bool| window.filter(|_| sliding);
    Ok(sliding.into_iter().map(window).collect())
}

/// Which layers turn queries and keys: all but some of SmolLM 3's.
pub(super) fn turned(family: Family, entries: &Entries, n: usize) -> Result<Vec<bool>> {
    if family != Family::SmolLm3 {
        return Ok(vec![true; n]);
    }
    let interval = entries.size("no_rope_layer_interval", 4)?;
    match entries.optional::<Vec<u8>>("no_rope_layers", None)? {
        None => Ok(alternating(n, interval)),
        Some(flags) if flags.len() < n => invalid(format!(
            "no_rope_layers has {} entries for num_hidden_layers {n}",
            flags.len()
        )),
        Some(flags) => Ok(flags.iter().take(n).map(|&turns| turns != 0).collect()),
    }
}

/// Every `pattern`-th layer sees everything.
fn alternating(n: usize, pattern: usize) -> Vec<bool> {
    (1..=n).map(|i| !i.is_multiple_of(pattern)).collect()
}

/// Which layers have a window.
fn layer_types(types: &[String], n: usize) -> Result<Vec<bool>> {
    if types.len() != n {
        return invalid(format!(
            "layer_types has {} entries for num_hidden_layers {n}",
            types.len()
        ));
    }
    let sliding = |layer: &String| match layer.as_str() {
        SLIDING => Ok(true),
        // The second is its older name.
        FULL | "attention" => Ok(false),
        _ => invalid(format!(
            "unsupported layer type {layer:?}, expected {FULL} or {SLIDING}"
        )),
    };
    types.iter().map(sliding).collect()
}

/// The rotary embedding of all layers; in Gemma 3 that of the layers that see everything and, second,
/// that of the others.
///
/// An entry in `rope_parameters` counts before one beside it. `rope_scaling` is its older name, and
/// counts before it.
pub(super) fn ropes(
    family: Family,
    entries: &Entries,
    head_dim: usize,
    max_positions: usize,
) -> Result<Vec<Rope>> {
    let object = |key: &str| match entries.value(key) {
        None => Ok(None),
        // An empty one is as good as none.
        Some(Value::Object(object)) if object.is_empty() => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object.clone())),
        Some(other) => invalid(format!("{key} is {other}, expected an object")),
    };
    let (old, new) = (object("rope_scaling")?, object("rope_parameters")?);
    let nested =
        |object: &Map<String, Value>| object.contains_key(FULL) || object.contains_key(SLIDING);
    let read = |object: Map<String, Value>| {
        let value = Value::Object(object);
        Parameters::deserialize(&value)
            .or_else(|e| invalid(format!("rope parameters {value}: {e}")))
    };
    let theta = family.defaults().rope_theta;
    if family == Family::Gemma3 {
        if old.as_ref().is_some_and(nested) {
            return invalid(format!(
                "rope_scaling of {family} is for its {FULL} layers: parameters of both kinds of layers are rope_parameters"
            ));
        }
        let of = |layers: &str| match &new {
            None => Ok(Map::new()),
            Some(new) => match new.get(layers) {
                Some(Value::Object(object)) => Ok(object.clone()),
                None | Some(Value::Null) if nested(new) => Ok(Map::new()),
                _ => invalid(format!(
                    "rope_parameters of {family} must have objects named {FULL} and {SLIDING}"
                )),
            },
        };
        let mut full = of(FULL)?;
        full.extend(old.into_iter().flatten());
        let (mut full, mut sliding) = (read(full)?, read(of(SLIDING)?)?);
        full.rope_theta = Some(full.rope_theta.unwrap_or(entries.or("rope_theta", theta)?));
        let local = entries.or("rope_local_base_freq", 1e4)?;
        sliding.rope_theta = Some(sliding.rope_theta.unwrap_or(local));
        let rope = |parameters: Parameters| {
            let parameters = unrotated(family, entries, parameters)?;
            Rope::new(&parameters, head_dim, max_positions)
        };
        return Ok(vec![rope(full)?, rope(sliding)?]);
    }
    let given = old.or(new).unwrap_or_default();
    if nested(&given) {
        return invalid(format!(
            "rope parameters by the type of layer, in a family whose layers share them: {family}"
        ));
    }
    let mut parameters = read(given)?;
    let theta = entries.or("rope_theta", theta)?;
    parameters.rope_theta = Some(parameters.rope_theta.unwrap_or(theta));
    // It counts before the one in the parameters.
    let default = (family == Family::Phi3).then_some(4096);
    if let Some(beside) = entries
        .optional_size("original_max_position_embeddings", default)?
        .or(default)
    {
        parameters.original_max_position_embeddings = Some(beside);
    }
    if family == Family::Phi3 {
        let name = parameters.rope_type.as_deref();
        match name.or(parameters.old_type.as_deref()) {
            // The names in the first configs.
            Some("su" | "yarn") => parameters.rope_type = Some("longrope".into()),
            None | Some("default" | "longrope") => (),
            Some(other) => {
                return invalid(format!(
                    "unsupported rope type {other:?} of {family}, expected default or longrope"
                ))
            }
        }
        if parameters.partial_rotary_factor.is_none() {
            let beside = entries.optional_number("partial_rotary_factor", None)?;
            parameters.partial_rotary_factor = beside;
        }
    } else {
        parameters = unrotated(family, entries, parameters)?;
    }
    Ok(vec![Rope::new(&parameters, head_dim, max_positions)?])
}

/// The families but Phi-3 turn whole heads: transformers passes over a `partial_rotary_factor` in the
/// default embedding, and fails at one in the others.
fn unrotated(family: Family, entries: &Entries, mut parameters: Parameters) -> Result<Parameters> {
    let beside = entries.optional_number("partial_rotary_factor", None)?;
    let factor = parameters.partial_rotary_factor.or(beside).unwrap_or(1.);
    if factor != 1. && parameters.name() != "default" {
        return invalid(format!(
            "partial_rotary_factor {factor} with rope type {:?}: {family} turns whole heads (only phi3 turns a part)",
            parameters.name()
        ));
    }
    parameters.partial_rotary_factor = None;
    Ok(parameters)
}
