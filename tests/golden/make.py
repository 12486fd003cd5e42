"""Writes golden.safetensors: losses and gradients by PyTorch, for tests/cpu/golden.rs.

    pip install torch safetensors --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/make.py

The tensors of a case are named `case/tensor`. Inputs have the case's dtype. bf16 cases multiply in f32,
as the crate does, and get their gradients in bf16.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

IGNORE_INDEX = -100
REDUCTIONS = ["mean", "sum", "none"]
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}

CASES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "ignored": {"ignored": True},
    "ignored_none": {"ignored": True, "reduction": "none"},
    "ignore_index": {"ignored": True, "ignore_index": 3},
    "shift_1": {"shift": 1},
    "shift_2_rank_3": {"shift": 2, "lead": (2, 2, 4), "reduction": "none"},
    "z_loss": {"z_weight": 0.1},
    "z_loss_ignored_shift": {"z_weight": 0.1, "ignored": True, "shift": 1},
    "z_loss_none": {"z_weight": 0.1, "reduction": "none", "ignored": True},
    "everything_mean": {
        "bias": True, "softcap": 3.0, "ignored": True, "shift": 1, "z_weight": 0.05,
    },
    "everything_sum": {
        "bias": True, "softcap": 3.0, "ignored": True, "shift": 1, "z_weight": 0.05, "reduction": "sum",
    },
    "everything_none": {
        "bias": True, "softcap": 3.0, "ignored": True, "shift": 1, "z_weight": 0.05, "reduction": "none",
    },
}

# Made after those above, so that their random numbers stay.
MORE_DTYPES = {"f64": torch.float64, "bf16": torch.bfloat16}
MORE_CASES = {
    "temperature": {"scale": 0.7},
    "class_weights": {"class_weights": True, "ignored": True},
    "class_weights_sum": {"class_weights": True, "reduction": "sum"},
    "class_weights_none": {"class_weights": True, "reduction": "none", "ignored": True},
    "token_weights": {"token_weights": True, "class_weights": True, "ignored": True, "shift": 1},
    "smoothing": {"smoothing": 0.1, "ignored": True, "bias": True},
    "smoothing_sum": {"smoothing": 0.3, "class_weights": True, "reduction": "sum"},
    "smoothing_none": {"smoothing": 0.3, "class_weights": True, "reduction": "none", "ignored": True},
    "entropy": {"entropy": True, "softcap": 3.0, "ignored": True},
    "all_options": {
        "bias": True, "ignored": True, "shift": 1, "scale": 1.4, "class_weights": True, "smoothing": 0.2,
        "entropy": True,
    },
}


def linear_cross_entropy_case(
    dtype, lead=(2, 5), reduction="mean", bias=False, softcap=None, ignored=False,
    ignore_index=IGNORE_INDEX, shift=0, z_weight=0.0, hidden=6, vocab=13, scale=1.0, smoothing=0.0,
    class_weights=False, token_weights=False, entropy=False,
):
    e = torch.randn(*lead, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    c = (torch.randn(vocab, hidden, dtype=torch.float64) * 0.6).to(dtype).requires_grad_()
    b = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    y = torch.randint(0, vocab, lead)
    if ignored:
        y = torch.where(torch.rand(lead) < 0.35, ignore_index, y)

    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    predicting = e[..., : lead[-1] - shift, :].to(wide)
    labels = y[..., shift:]
    logits = predicting @ c.to(wide).T
    if bias:
        logits = logits + b.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits * scale
    of_classes = torch.rand(vocab, dtype=torch.float32) + 0.25 if class_weights else None
    of_tokens = torch.rand(lead, dtype=torch.float32) if token_weights else None

    def cross_entropy(reduction):
        flat = F.cross_entropy(
            logits.reshape(-1, vocab), labels.reshape(-1), ignore_index=ignore_index, reduction=reduction,
            weight=of_classes.to(wide) if class_weights else None, label_smoothing=smoothing,
        )
        return flat.reshape(labels.shape) if reduction == "none" else flat

    counted = labels != ignore_index
    if token_weights:
        # PyTorch has no such weights: its mean, by hand.
        assert reduction == "mean"
        of_positions = of_tokens[..., shift:].to(wide) * counted
        total = of_positions * of_classes[labels.clamp(min=0)]
        loss = (cross_entropy("none") * of_positions).sum() / total.sum()
    else:
        loss = cross_entropy(reduction)
    lse = torch.where(counted, torch.logsumexp(logits, -1), 0.0)
    squares = lse**2
    z = {
        "none": squares,
        "sum": squares.sum(),
        "mean": squares.sum() / counted.sum(),
    }[reduction]
    weights = torch.rand(loss.shape, dtype=torch.float32)
    total = ((loss + z_weight * z) * weights.to(wide)).sum()
    if entropy:
        logs = torch.log_softmax(logits, -1)
        entropies = torch.where(counted, -(logs.exp() * logs).sum(-1), 0.0)
        entropy_weights = torch.rand(labels.shape, dtype=torch.float32)
        total = total + (entropies * entropy_weights.to(wide)).sum()
    total.backward()

    tensors = {
        "embeddings": e, "classifier": c, "targets": y,
        "loss": loss, "lse": lse, "z": z, "weights": weights,
        "grad_embeddings": e.grad, "grad_classifier": c.grad,
        "shift": torch.tensor(shift), "ignore_index": torch.tensor(ignore_index),
        "reduction": torch.tensor(REDUCTIONS.index(reduction)),
        "z_weight": torch.tensor(z_weight, dtype=torch.float64),
    }
    if bias:
        tensors |= {"bias": b, "grad_bias": b.grad}
    if softcap is not None:
        tensors["softcap"] = torch.tensor(softcap, dtype=torch.float64)
    if scale != 1.0:
        tensors["logit_scale"] = torch.tensor(scale, dtype=torch.float64)
    if smoothing:
        tensors["label_smoothing"] = torch.tensor(smoothing, dtype=torch.float64)
    if class_weights:
        tensors["class_weights"] = of_classes
    if token_weights:
        tensors["token_weights"] = of_tokens
    if entropy:
        predicted = torch.where(counted, logits.argmax(-1), 2**32 - 1)
        tensors |= {"entropy": entropies, "entropy_weights": entropy_weights, "predicted": predicted}
    return tensors


def main():
    torch.manual_seed(20261125)
    cases = {}
    for dtype_name, dtype in DTYPES.items():
        for name, settings in CASES.items():
            cases[f"{dtype_name}_{name}"] = linear_cross_entropy_case(dtype, **settings)
    for dtype_name, dtype in MORE_DTYPES.items():
        for name, settings in MORE_CASES.items():
            cases[f"{dtype_name}_{name}"] = linear_cross_entropy_case(dtype, **settings)
    tensors = {
        f"{case}/{name}": tensor.detach().contiguous().clone()
        for case, tensors in cases.items()
        for name, tensor in tensors.items()
    }
    save_file(tensors, Path(__file__).with_name("golden.safetensors"))


if __name__ == "__main__":
    main()
