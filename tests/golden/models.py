"""Writes models/: small checkpoints by Hugging Face transformers and what it computes with them, for
tests/models.

    pip install torch transformers --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/models.py [CASE ..]

Without a case, all are written.

A case is a folder as `save_pretrained` writes it, weights in bf16, and expected.safetensors: `ids`, `labels`,
and, computed in f32, `logits`, `loss`, and `gradient_norms`, one of each parameter in the order of their names.
`short_logits` are those of the first SHORT positions alone.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHORT = 6
BATCH, LENGTH, VOCAB = 2, 20, 32
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
# Phi-3 and Qwen2 have no head_dim of their own.
SQUARE = SIZES | dict(hidden_size=32)
del SQUARE["head_dim"]

CASES = {
    "llama": ("llama", SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "llama3": ("llama", SIZES | dict(tie_word_embeddings=True, rope_parameters=dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16))),
    "mistral": ("mistral", SIZES | dict(sliding_window=5)),
    "phi3": ("phi3", SQUARE | dict(sliding_window=7, rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "phi3_long": ("phi3", SQUARE | dict(
        num_hidden_layers=1, max_position_embeddings=64, original_max_position_embeddings=8,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=100.0, partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2], long_factor=[1.5, 2.5, 4.0]))),
    "qwen2": ("qwen2", SQUARE | dict(
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("qwen3", SIZES | dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16))),
    "gemma": ("gemma", SIZES),
    "gemma2": ("gemma2", SIZES | dict(
        sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", SIZES | dict(
        num_hidden_layers=3, sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=12,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0)))),
    "smollm3": ("smollm3", SIZES | dict(
        num_hidden_layers=3, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5,
        rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "granite": ("granite", SIZES | dict(
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=1.5,
        attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=100.0))),
}
SHARDED = {"llama"}


def randomise(model):
    """Weights that make every part of the model matter, exact in bf16."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("norm.weight"):
            value = parameter + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            value = noise * (0.7 if "embed" in name or "lm_head" in name else parameter.shape[-1] ** -0.5)
        parameter.data = value.to(torch.bfloat16).to(torch.float32)


def make(folder, model_type, settings):
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    labels = torch.where(torch.rand(BATCH, LENGTH) < 0.25, -100, ids)
    output = model(input_ids=ids, labels=labels, use_cache=False)
    output.loss.backward()
    parameters = sorted(model.named_parameters())
    tensors = {
        "ids": ids, "labels": labels, "loss": output.loss.detach(), "logits": output.logits.detach(),
        "gradient_norms": torch.stack([p.grad.norm() for _, p in parameters]),
        "short_logits": model(input_ids=ids[:, :SHORT], use_cache=False).logits.detach(),
    }
    sharding = dict(max_shard_size="4KB") if folder.name in SHARDED else {}
    model.to(torch.bfloat16).save_pretrained(folder, **sharding)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    root = Path(__file__).parent / "models"
    for seed, (name, (model_type, settings)) in enumerate(CASES.items()):
        if name not in (sys.argv[1:] or CASES):
            continue
        shutil.rmtree(root / name, ignore_errors=True)
        torch.manual_seed(seed)
        make(root / name, model_type, settings)
