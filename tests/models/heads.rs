//! The cut that the example `heads` makes.

#[path = "../../examples/cut/mod.rs"]
mod cut;

use candle_core::{DType, Device, Result, Tensor};

struct Head {
    embeddings: Tensor,
    classifier: Tensor,
    targets: Vec<i64>,
    softcap: Option<f64>,
}

fn probabilities(embeddings: &Tensor, classifier: &Tensor) -> Result<Vec<Vec<f64>>> {
    let logits = embeddings.matmul(&classifier.t()?)?;
    candle_nn::ops::softmax(&logits.to_dtype(DType::F64)?, 1)?.to_vec2()
}

#[test]
fn a_cut_has_the_probabilities_of_its_blocks() -> anyhow::Result<()> {
    let (device, rows) = (Device::Cpu, 8);
    let whole = Head {
        embeddings: Tensor::randn(0f32, 1., (12, 6), &device)?,
        classifier: Tensor::randn(0f32, 1., (5 * 128 + 3, 6), &device)?,
        targets: vec![0, 127, 128, 255, 256, 383, 384, 642, 1, 2, 3, 4],
        softcap: None,
    };
    // Six dimensions and that of the others are all there are.
    let sizes = cut::Sizes {
        rows,
        blocks: 2,
        dims: 7,
    };
    let (head, lost) = cut::cut(&whole, sizes)?;
    assert!(lost < 1e-6, "{lost}");
    assert_eq!(head.embeddings.dims(), [rows, 7]);
    assert_eq!(head.classifier.dims(), [257, 7]);
    assert_eq!(head.targets, [0, 127, 256, 256, 128, 255, 256, 256]);
    assert_eq!(head.softcap, whole.softcap);

    let want = probabilities(&whole.embeddings, &whole.classifier)?;
    let got = probabilities(&head.embeddings, &head.classifier)?;
    for (row, (got, want)) in got.iter().zip(&want).enumerate() {
        let kept = [&want[..128], &want[256..384]].concat();
        let others = 1. - kept.iter().sum::<f64>();
        for (class, want) in kept.into_iter().chain([others]).enumerate() {
            let got = got[class];
            assert!(
                (got - want).abs() < 1e-5,
                "row {row}, class {class}: {got}, want {want}"
            );
        }
    }

    let sizes = cut::Sizes { rows: 13, ..sizes };
    let message = cut::cut(&whole, sizes).err().unwrap().to_string();
    assert!(
        message.starts_with("--cut 13,2,7 needs 13 rows of 12"),
        "{message}"
    );
    Ok(())
}
