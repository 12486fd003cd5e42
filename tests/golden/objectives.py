"""Writes objectives.safetensors: objectives and their gradients by TRL, for tests/cpu/golden_objectives.rs.

    pip install torch trl safetensors --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/objectives.py

The losses are computed by the methods of TRL's trainers, on given log-probabilities: what a method asks of its trainer
and of its model is given by stand-ins. All is in f64. The tensors of a case are named `case/tensor`; `grad_x` is the
gradient of the loss with respect to `x`.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from safetensors.torch import save_file
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, TIME = 5, 7
LENGTHS = torch.tensor([7, 3, 1, 5, 6, 2, 7, 4, 1, 6])  # of the chosen answers, then of the rejected


def trainer(**settings):
    same = lambda x, **_: x  # with one process there is nothing to gather
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same, reduce=same, num_processes=1,
                                  sync_gradients=False)
    usual = dict(
        accelerator=accelerator, aux_loss_enabled=False, label_smoothing=0.0, precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return MagicMock(**usual | settings)


def answers(count):
    """nll `(count, TIME)` of answers to be differentiated, that of a reference, and which tokens count."""
    mask = (torch.arange(TIME) < LENGTHS[:count, None]).to(torch.uint8)
    nll = 3 * torch.rand(count, TIME, dtype=torch.float64) * mask
    reference_nll = (nll + 0.5 * torch.randn(count, TIME, dtype=torch.float64)).abs() * mask
    return nll.requires_grad_(), reference_nll, mask


def summed(nll, mask):
    return -(nll * mask).sum(-1)


def averaged(nll, mask):
    return summed(nll, mask) / mask.sum(-1)


def model(log_probs):
    """A model whose head says that these are the log-probabilities of the tokens."""
    zeros = torch.zeros_like(log_probs)
    outputs = dict(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: SimpleNamespace(**outputs)


def tokens(mask):
    """What says of token ids that they are an answer: a token of prompt comes first."""
    completion = torch.nn.functional.pad(mask.long(), (1, 0))
    return dict(input_ids=torch.zeros_like(completion), attention_mask=torch.ones_like(completion),
                completion_mask=completion)


def with_reference(loss_type, beta):
    nll, reference_nll, mask = answers(2 * PAIRS)
    of_reference = summed(reference_nll, mask)
    dpo = trainer(loss_types=[loss_type], loss_weights=[1.0], beta=beta, ld_alpha=None, use_weighting=False,
                  f_divergence_type="reverse_kl")
    inputs = tokens(mask) | dict(ref_chosen_logps=of_reference[:PAIRS], ref_rejected_logps=of_reference[PAIRS:])
    loss = DPOTrainer._compute_loss(dpo, model(-nll * mask), inputs, False)
    return dict(nll=nll, reference_nll=reference_nll, mask=mask, loss=loss)


def chosen_and_rejected(log_probs):
    return log_probs[:PAIRS], log_probs[PAIRS:]


def cpo(beta, alpha):
    nll, _, mask = answers(2 * PAIRS)
    chosen, rejected = chosen_and_rejected(summed(nll, mask))
    losses, _, _ = CPOTrainer.cpo_loss(trainer(loss_type="sigmoid", beta=beta, alpha=0.0), chosen, rejected)
    return dict(nll=nll, mask=mask, loss=losses.mean() - alpha * chosen.mean())


def simpo(beta, gamma):
    nll, _, mask = answers(2 * PAIRS)
    chosen, rejected = chosen_and_rejected(averaged(nll, mask))
    settings = trainer(loss_type="simpo", beta=beta, simpo_gamma=gamma, alpha=0.0)
    losses, _, _ = CPOTrainer.cpo_loss(settings, chosen, rejected)
    return dict(nll=nll, mask=mask, loss=losses.mean())


def orpo(weight):
    nll, _, mask = answers(2 * PAIRS)
    chosen, rejected = chosen_and_rejected(averaged(nll, mask))
    with patch.object(torch.Tensor, "float", lambda x: x):  # TRL computes it in f32
        losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=weight), chosen, rejected)
    return dict(nll=nll, mask=mask, loss=-chosen.mean() - losses.mean())


def kto(beta, desirable_weight, undesirable_weight, further):
    nll, reference_nll, mask = answers(6)
    desirable = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.uint8)
    reference_mismatched = -10 * torch.rand(6, dtype=torch.float64)
    mismatched = reference_mismatched + further + torch.rand(6, dtype=torch.float64)
    settings = trainer(loss_type="kto", beta=beta, desirable_weight=desirable_weight, calculate_KL=True,
                       undesirable_weight=undesirable_weight)
    settings._compute_kl_logps = lambda *_: mismatched
    inputs = tokens(mask) | dict(label=desirable.bool(), ref_logps=summed(reference_nll, mask),
                                 ref_KL_logps=reference_mismatched)
    loss = KTOTrainer._compute_loss(settings, model(-nll * mask), inputs, False)
    return dict(nll=nll, reference_nll=reference_nll, mask=mask, desirable=desirable, mismatched=mismatched,
                reference_mismatched=reference_mismatched, loss=loss)


def grpo(loss_type, low=0.2, high=0.2, level="token", length=0, kl=0.0, entropy=0.0, of_tokens=False):
    shape = (8, TIME)
    rand = lambda *shape: torch.rand(*shape, dtype=torch.float64)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    log_probs = (-3 * rand(*shape)).requires_grad_()
    old_log_probs = log_probs.detach() + 0.3 * randn(*shape)
    reference_log_probs = log_probs.detach() + 0.5 * randn(*shape)
    advantages = randn(*shape) if of_tokens else randn(shape[0])
    entropies = (2 * rand(*shape)).requires_grad_()
    mask = (rand(*shape) < 0.7).to(torch.uint8)
    mask[-1] = 0  # an answer of which nothing counts
    settings = trainer(
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=low, epsilon_high=high, beta=kl,
        entropy_coef=entropy, _entropy_bonus_enabled=entropy > 0, max_completion_length=length,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None, use_bias_correction_kl=False,
                                                                    steps_per_generation=1),
    )
    settings._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, entropies, None)
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask, advantages=advantages,
        old_per_token_logps=old_log_probs, ref_per_token_logps=reference_log_probs, num_items_in_batch=mask.sum(),
    )
    loss = GRPOTrainer._compute_loss(settings, None, inputs)
    return dict(log_probs=log_probs, old_log_probs=old_log_probs, reference_log_probs=reference_log_probs,
                advantages=advantages, entropies=entropies, mask=mask, loss=loss)


def group_advantages():
    # In TRL these lines are part of a method that samples.
    rewards = torch.rand(4, 6, dtype=torch.float64)
    above = rewards - rewards.mean(1, keepdim=True)
    return dict(rewards=rewards, above=above, scaled=above / (rewards.std(1, keepdim=True) + 1e-4))


def main():
    torch.manual_seed(20261127)
    cases = {
        "dpo": with_reference("sigmoid", 0.3),
        "ipo": with_reference("ipo", 0.4),
        "cpo": cpo(0.2, 0.7),
        "simpo": simpo(2.0, 0.5),
        "orpo": orpo(0.6),
        "kto": kto(0.3, 1.5, 0.7, 0.5),
        "kto_below": kto(0.3, 1.0, 1.0, -4.0),
        "grpo": grpo("grpo"),
        "grpo_kl": grpo("grpo", kl=0.04),
        "dapo": grpo("dapo", high=0.28),
        "dr_grpo": grpo("dr_grpo", length=16),
        "gspo": grpo("grpo", low=0.05, high=0.1, level="sequence"),
        "everything": grpo("dapo", low=0.05, high=0.1, level="sequence", kl=0.2, entropy=0.3),
        "entropy": grpo("grpo", entropy=0.1),
        "ppo": grpo("bnpo", of_tokens=True),
        "group_advantages": group_advantages(),
    }
    tensors = {}
    for case, named in cases.items():
        if "loss" in named:
            named["loss"].backward()
        for name, tensor in named.items():
            tensors[f"{case}/{name}"] = tensor.detach().contiguous().clone()
            if tensor.is_leaf and tensor.grad is not None:
                tensors[f"{case}/grad_{name}"] = tensor.grad.contiguous().clone()
    save_file(tensors, Path(__file__).with_name("objectives.safetensors"))


if __name__ == "__main__":
    main()
