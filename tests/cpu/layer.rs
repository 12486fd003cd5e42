//! The layer.

use crate::common::{close, exact, numbers, Random};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::{
    cut_cross_entropy, linear_cross_entropy, LinearCrossEntropy, Options,
};
use candle_nn::{Linear, Module, VarBuilder, VarMap};

#[test]
fn the_layer_is_the_function_with_its_weight() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let options = exact().softcap(3.).shift(1);
    let layer = cut_cross_entropy(6, 11, options.clone(), vb.pp("head"))?;
    assert_eq!(layer.weight().dims(), [11, 6]);
    assert_eq!(vars.all_vars().len(), 2);
    let hidden: Vec<f32> = Random::new(1)
        .normals(60, 1.)
        .iter()
        .map(|x| *x as f32)
        .collect();
    let hidden = Tensor::from_vec(hidden, (2, 5, 6), &Device::Cpu)?;
    let targets = Tensor::new(&[[0i64, 3, 10, 1, 2], [5, 5, 9, 0, 7]], &Device::Cpu)?;
    let got = layer.forward(&hidden, &targets)?.loss;
    let options = options.bias(layer.bias().unwrap());
    let want = linear_cross_entropy(&hidden, layer.weight(), &targets, &options)?.loss;
    assert_eq!(got.to_scalar::<f32>()?, want.to_scalar::<f32>()?);

    // The loss is the cross-entropy of the logits the layer gives for sampling.
    let logits = layer.logits(&hidden)?;
    assert_eq!(logits.dims(), [2, 5, 11]);
    let predicting = logits.narrow(1, 0, 4)?.reshape((8, 11))?;
    let labels = targets.narrow(1, 1, 4)?.flatten_all()?;
    let candles = candle_nn::loss::cross_entropy(&predicting, &labels)?;
    close("loss", &numbers(&got)?, &numbers(&candles)?, 1e-6, 1.).unwrap();

    // Tied to a linear layer, it has that layer's tensors.
    let linear = Linear::new(layer.weight().clone(), layer.bias().cloned());
    let tied = LinearCrossEntropy::from_linear(&linear, Options::default());
    assert_eq!(tied.weight().id(), layer.weight().id());
    let flat = hidden.reshape((10, 6))?;
    let (tied, linear) = (
        numbers(&tied.logits(&flat)?)?,
        numbers(&linear.forward(&flat)?)?,
    );
    close("logits", &tied, &linear, 1e-6, 1.).unwrap();
    Ok(())
}
