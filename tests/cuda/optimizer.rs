//! What a training step does with gradients on a GPU, beside the same on the CPU.

use crate::common::{numbers, Random};
use crate::{device, DTYPES};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::models::{clip_gradients, clip_gradients_on_device, AdamW};
use candle_nn::{Optimizer, ParamsAdamW};

/// The last is not a multiple of the numbers of an access.
const SHAPES: [&[usize]; 4] = [&[300, 130], &[64], &[1], &[7, 11]];

fn vars(dtype: DType, device: &Device) -> Result<Vec<Var>> {
    let mut random = Random::new(3);
    let var = |shape: &[usize]| {
        let values = random.normals(shape.iter().product(), 1.);
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Var::from_tensor(&tensor.to_dtype(dtype)?.to_device(device)?)
    };
    SHAPES.into_iter().map(var).collect()
}

fn gradients(vars: &[Var], seed: u64) -> Result<GradStore> {
    let mut random = Random::new(seed);
    let mut gradients = GradStore::default();
    for var in vars {
        let values = random.normals(var.elem_count(), 1.);
        let tensor = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
        let tensor = tensor.to_dtype(var.dtype())?.to_device(var.device())?;
        gradients.insert(var, tensor);
    }
    Ok(gradients)
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    let (got, want) = (numbers(got)?, numbers(want)?);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let allowed = tolerance * want.abs().max(1e-2);
        assert!(
            (got - want).abs() <= allowed,
            "{what}[{i}] is {got:e}, want {want:e}"
        );
    }
    Ok(())
}

#[test]
fn steps_of_adamw_are_those_on_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let (on_cpu, on_gpu) = (vars(dtype, &Device::Cpu)?, vars(dtype, &device)?);
        let params = ParamsAdamW {
            lr: 0.01,
            weight_decay: 0.1,
            ..ParamsAdamW::default()
        };
        let mut cpu = AdamW::new(on_cpu.clone(), params.clone())?;
        let mut gpu = AdamW::new(on_gpu.clone(), params)?;
        for step in 0..5 {
            cpu.step(&gradients(&on_cpu, step)?)?;
            gpu.step(&gradients(&on_gpu, step)?)?;
        }
        // A rounding apart, where the sum before it is.
        let tolerance = match dtype {
            DType::F32 => 1e-5,
            DType::F16 => 2e-3,
            _ => 1e-2,
        };
        for (got, want) in on_gpu.iter().zip(&on_cpu) {
            let what = format!("{dtype:?} {:?}", want.dims());
            assert_close(&what, got, want, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn a_state_saved_on_a_gpu_goes_on_with_the_same_bits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let folder = std::env::temp_dir().join(format!("adamw-on-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("state.safetensors");
    let all = vars(DType::BF16, &device)?;
    let mut first = AdamW::new(all.clone(), ParamsAdamW::default())?;
    first.step(&gradients(&all, 1)?)?;
    first.save(&path)?;
    let copies: Vec<Var> = all
        .iter()
        .map(|var| Var::from_tensor(&var.copy()?))
        .collect::<Result<_>>()?;
    let mut second = AdamW::new(copies.clone(), ParamsAdamW::default())?;
    second.load(&path)?;
    first.step(&gradients(&all, 2)?)?;
    second.step(&gradients(&copies, 2)?)?;
    std::fs::remove_dir_all(&folder)?;
    for (a, b) in all.iter().zip(&copies) {
        assert_eq!(numbers(a)?, numbers(b)?);
    }
    Ok(())
}

#[test]
fn gradients_are_clipped_as_on_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let (on_cpu, on_gpu) = (vars(dtype, &Device::Cpu)?, vars(dtype, &device)?);
        for max_norm in [1., 1e6] {
            let mut want = gradients(&on_cpu, 9)?;
            let norm = clip_gradients(&mut want, &on_cpu, max_norm)?;
            for waits in [true, false] {
                let mut got = gradients(&on_gpu, 9)?;
                let here = match waits {
                    true => clip_gradients(&mut got, &on_gpu, max_norm)?,
                    false => {
                        let norm = clip_gradients_on_device(&mut got, &on_gpu, max_norm)?;
                        f64::from(norm.to_scalar::<f32>()?)
                    }
                };
                assert!(
                    (here - norm).abs() <= 1e-5 * norm,
                    "{dtype:?}: {here} {norm}"
                );
                for (gpu, cpu) in on_gpu.iter().zip(&on_cpu) {
                    let what = format!("{dtype:?} {:?} at most {max_norm}", cpu.dims());
                    let (got, want) = (got.get(gpu), want.get(cpu));
                    assert_close(&what, got.expect("one"), want.expect("one"), 1e-2)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for device in [Device::Cpu, device] {
        for value in [f32::NAN, f32::INFINITY] {
            let var = Var::zeros(2, DType::F32, &device)?;
            let mut all = GradStore::default();
            all.insert(&var, Tensor::new(&[value, 3.], &device)?);
            let norm = clip_gradients_on_device(&mut all, std::slice::from_ref(&var), 1.)?;
            assert!(!norm.to_scalar::<f32>()?.is_finite());
            assert_eq!(all.get(&var).expect("one").to_vec1::<f32>()?[1], 3.);
        }
    }
    Ok(())
}
