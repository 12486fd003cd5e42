"""Writes soft_targets.safetensors: divergences from a teacher and their gradients, for tests/cpu/golden_soft_targets.rs.

    pip install torch safetensors --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/soft_targets.py

Divergences are those of PyTorch's `kl_div`; the Jensen-Shannon one is put together as TRL's `generalized_jsd_loss` is. All
is in f64. Inputs are named `input/name`, results `case/loss` and `case/grad_name`, the gradient with respect to an input.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

LEAD, VOCAB, HIDDEN, TEACHER_HIDDEN, K = (2, 4), 11, 5, 3, 4
LEARNT = ["embeddings", "classifier", "bias", "teacher_embeddings", "teacher_classifier", "teacher_bias"]
# What every case that ends in `_all` has.
SHIFT, SOFTCAP, TEACHER_SOFTCAP, TEMPERATURE = 1, 3.0, 2.0, 2.0


def inputs():
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64)
    classes = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(LEAD[0] * LEAD[1])])
    return {
        "embeddings": normal(*LEAD, HIDDEN), "classifier": normal(VOCAB, HIDDEN), "bias": normal(VOCAB),
        "teacher_embeddings": normal(*LEAD, TEACHER_HIDDEN), "teacher_classifier": normal(VOCAB, TEACHER_HIDDEN),
        "teacher_bias": normal(VOCAB),
        "targets": torch.tensor([[0, 1, -100, 2], [3, 4, 5, -100]]),
        "classes": classes.reshape(*LEAD, K),
        "probabilities": F.softmax(normal(*LEAD, K + 1), -1)[..., :K].float().double(),
    }


def log_probs(x, of, everything):
    logits = x[of + "embeddings"] @ x[of + "classifier"].T
    if everything:
        softcap = TEACHER_SOFTCAP if of else SOFTCAP
        logits = softcap * torch.tanh((logits + x[of + "bias"]) / softcap) / TEMPERATURE
    return F.log_softmax(logits, -1)


def kl(p, q):
    """KL(p || q) of log-probabilities."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def jensen_shannon(student, teacher, beta):
    beta = torch.tensor(beta, dtype=torch.float64)
    mixture = torch.logsumexp(torch.stack([student + torch.log1p(-beta), teacher + torch.log(beta)]), 0)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def top_k(student, x, rest):
    q = x["probabilities"]
    p = student.gather(-1, x["classes"])
    if rest == "renormalized":
        q = q / q.sum(-1, keepdim=True)
    if rest == "one_class":
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        p = torch.cat([p, (1 - p.exp().sum(-1, keepdim=True)).log()], -1)
    return kl(q.log(), p)


def run(x, kind, everything):
    x = {name: tensor.clone().requires_grad_(name in LEARNT) for name, tensor in x.items()}
    student, teacher = log_probs(x, "", everything), log_probs(x, "teacher_", everything)
    divergences = {
        "forward": lambda: kl(teacher, student),
        "reverse": lambda: kl(student, teacher),
        "jensen_shannon": lambda: jensen_shannon(student, teacher, 0.3),
        "one_class": lambda: top_k(student, x, kind),
        "left_out": lambda: top_k(student, x, kind),
        "renormalized": lambda: top_k(student, x, kind),
    }[kind]()
    if everything:
        divergences, targets = divergences[:, :-SHIFT], x["targets"][:, SHIFT:]
        divergences = divergences[targets != -100]
    loss = divergences.mean()
    loss.backward()
    grads = {f"grad_{name}": x[name].grad for name in LEARNT if x[name].grad is not None}
    return {"loss": loss.detach()} | grads


def main():
    torch.manual_seed(20261129)
    x = inputs()
    tensors = {f"input/{name}": tensor for name, tensor in x.items()}
    for kind in ["forward", "reverse", "jensen_shannon", "one_class", "left_out", "renormalized"]:
        for everything in [False, True]:
            for name, tensor in run(x, kind, everything).items():
                tensors[f"{kind}{'_all' if everything else ''}/{name}"] = tensor.contiguous()
    save_file(tensors, Path(__file__).with_name("soft_targets.safetensors"))


if __name__ == "__main__":
    main()
