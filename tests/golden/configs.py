"""Writes configs.json: texts of config.json and what Hugging Face transformers reads from them, for tests/models.

    pip install torch transformers --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/configs.py

Each case is the text alone (`config`) and what is built from it (`read`): sizes, biases and scales are those of
the modules of a model on the meta device, windows those of its layers, frequencies those of its rotary embedding,
`[time, count, [[index, frequency], ..]]` for a sequence of that length. What transformers saves of it (`saved`) reads
the same.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"]
TIMES = [4, 40, 400]
POINTS = [-1.5, -0.25, 0.75]

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=32, pad_token_id=None)
HEADS = SMALL | dict(num_key_value_heads=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.5, 4.0, 8.0])

VARIANTS = [(f, SMALL) for f in FAMILIES if f not in ("mistral", "qwen2", "qwen3", "gemma")]
VARIANTS += [(f, HEADS) for f in FAMILIES]
VARIANTS += [
    ("llama", HEADS | dict(head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("llama", HEADS | dict(num_key_value_heads=None, head_dim=None, eos_token_id=[3, 4])),
    ("llama", HEADS | dict(eos_token_id=None, hidden_act="gelu", rms_norm_eps=1e-5, rope_theta=500.0)),
    ("llama", HEADS | dict(rope_scaling=None, rope_theta=300.0, sliding_window=5, partial_rotary_factor=0.5)),
    ("llama", HEADS | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=16), rope_theta=500.0)),
    ("llama", HEADS | dict(rope_scaling=LLAMA3, rope_theta=500.0)),
    # The entry beside counts before the one inside.
    ("llama", HEADS | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=16),
                           original_max_position_embeddings=8)),
    # The one inside counts before the one beside.
    ("llama", HEADS | dict(rope_theta=7.0, rope_parameters=dict(rope_type="default", rope_theta=70.0))),
    # The older name counts before the newer.
    ("llama", HEADS | dict(rope_scaling=dict(type="linear", factor=2.0),
                           rope_parameters=dict(rope_type="linear", factor=4.0))),
    ("llama", HEADS | dict(rope_scaling=dict(rope_type="linear", type="dynamic", factor=2.0))),
    ("llama", HEADS | dict(rope_scaling=dict(type="dynamic", factor=2.0), rope_theta=100.0)),
    ("mistral", HEADS | dict(sliding_window=None, head_dim=16)),
    ("mistral", HEADS | dict(sliding_window=7, attention_bias=True, mlp_bias=True)),
    ("qwen2", HEADS | dict(use_sliding_window=True, max_window_layers=2)),
    ("qwen2", HEADS | dict(use_sliding_window=True, max_window_layers=2, sliding_window=None)),
    ("qwen2", HEADS | dict(use_sliding_window=True, sliding_window=6)),
    ("qwen2", HEADS | dict(sliding_window=6, max_window_layers=2)),
    ("qwen2", SMALL | dict(num_key_value_heads=None)),
    ("qwen3", HEADS | dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    ("qwen3", HEADS | dict(use_sliding_window=True, sliding_window=6, layer_types=[
        "sliding_attention", "full_attention", "attention", "sliding_attention"])),
    ("qwen3", HEADS | dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    ("qwen3", HEADS | dict(head_dim=32, rope_scaling=dict(
        type="yarn", factor=4.0, beta_fast=8, beta_slow=0, truncate=False, mscale=0.5, mscale_all_dim=0.25),
        original_max_position_embeddings=16)),
    ("phi3", HEADS | dict(rope_scaling=dict(type="longrope") | LONG, original_max_position_embeddings=8)),
    ("phi3", HEADS | dict(rope_scaling=dict(type="yarn") | LONG)),
    ("phi3", HEADS | dict(hidden_size=64, partial_rotary_factor=0.5, original_max_position_embeddings=8,
                          rope_scaling=dict(type="longrope", original_max_position_embeddings=16) | LONG)),
    ("phi3", HEADS | dict(partial_rotary_factor=0.5, sliding_window=5)),
    ("gemma", HEADS | dict(hidden_act="gelu", hidden_activation=None, head_dim=16)),
    ("gemma", HEADS | dict(hidden_act="relu", hidden_activation="gelu", attention_bias=True)),
    ("gemma2", HEADS | dict(hidden_act="relu", query_pre_attn_scalar=9, final_logit_softcapping=None,
                            attn_logit_softcapping=None, tie_word_embeddings=False)),
    ("gemma2", HEADS | dict(hidden_activation="gelu", sliding_window=6, final_logit_softcapping=4.0,
                            attn_logit_softcapping=5.0, head_dim=8)),
    ("gemma3_text", HEADS | dict(sliding_window_pattern=2, sliding_window=6, final_logit_softcapping=4.0,
                                 attn_logit_softcapping=5.0, head_dim=8)),
    ("gemma3_text", HEADS | dict(rope_theta=50.0, rope_local_base_freq=20.0, num_hidden_layers=7,
                                 rope_scaling=dict(rope_type="linear", factor=8.0))),
    ("gemma3_text", HEADS | dict(rope_theta=50.0, num_hidden_layers=7, rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0), sliding_attention=dict(rope_theta=30.0)))),
    ("gemma3_text", HEADS | dict(partial_rotary_factor=0.5, num_hidden_layers=7)),
]
VARIANTS += [
    ("smollm3", HEADS | dict(no_rope_layer_interval=3, use_sliding_window=True, sliding_window=6, mlp_bias=True)),
    ("smollm3", HEADS | dict(no_rope_layers=[1, 0, 0, 1, 1], attention_bias=True, tie_word_embeddings=False)),
    ("smollm3", HEADS | dict(rope_theta=300.0, sliding_window=6, rope_scaling=dict(rope_type="linear", factor=2.0))),
    ("granite", HEADS | dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
                             logits_scaling=8.0, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
]
GEMMA3_TEXT = dict(
    hidden_size=32, intermediate_size=48, model_type="gemma3_text", num_hidden_layers=7, sliding_window=6,
    rope_scaling=dict(rope_type="linear", factor=8.0))
VARIANTS += [
    ("gemma3", dict(text_config=GEMMA3_TEXT, eos_token_id=[1, 106])),
    ("gemma3", dict(text_config=GEMMA3_TEXT | dict(tie_word_embeddings=False))),
    ("gemma3", dict(text_config=GEMMA3_TEXT, tie_word_embeddings=False)),
]


def load(entries):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(entries))
        return AutoConfig.from_pretrained(folder)


def rope(text, kind, embedding_class):
    """Of layers of one kind, for sequences of TIMES, each in a new embedding, as it keeps what it has seen."""
    at = []
    for time in TIMES:
        embedding = embedding_class(text)
        positions = torch.arange(time)[None]
        x = torch.zeros(1)
        by_kind = text.model_type == "gemma3_text"
        embedding(x, positions, kind) if by_kind else embedding(x, positions)
        name = f"{kind}_" if by_kind else ""
        frequencies = getattr(embedding, f"{name}inv_freq").tolist()
        some = range(0, len(frequencies), max(1, len(frequencies) // 4))
        at.append([time, len(frequencies), [[i, float(f"{frequencies[i]:.8g}")] for i in some]])
        scale = getattr(embedding, f"{name}attention_scaling")
    return dict(at=at, scale=scale)


def read(entries):
    config = load(entries)
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    body = model.get_decoder()
    layers = body.layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    all_alike = text.model_type in ("mistral", "phi3")
    windows = [text.sliding_window if all_alike else getattr(l.self_attn, "sliding_window", None) for l in layers]
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    kinds = kinds if text.model_type == "gemma3_text" else [kinds[0]]
    embedding_class = type(body.rotary_emb)
    turned = [getattr(l.self_attn, "use_rope", True) for l in layers]
    ropes = {kind: rope(text, kind, embedding_class) for kind in sorted(set(kinds))}
    bias = lambda module, *names: any(getattr(getattr(module, n, None), "bias", None) is not None for n in names)
    fused = hasattr(attention, "qkv_proj")
    inner = mlp.down_proj.in_features
    eos = getattr(config, "eos_token_id", text.eos_token_id)
    return dict(
        vocab_size=body.embed_tokens.num_embeddings,
        hidden_size=body.embed_tokens.embedding_dim,
        intermediate_size=inner,
        num_attention_heads=attention.o_proj.in_features // attention.head_dim,
        num_key_value_heads=(
            (attention.qkv_proj.out_features - attention.o_proj.in_features) // 2 if fused
            else attention.k_proj.out_features) // attention.head_dim,
        head_dim=attention.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        activation=ACT2FN[
            text.hidden_activation if text.model_type in ("gemma2", "gemma3_text") else text.hidden_act
        ](torch.tensor(POINTS)).tolist(),
        rms_norm_eps=text.rms_norm_eps,
        attention_scale=attention.scaling,
        attention_softcap=text.attn_logit_softcapping if text.model_type == "gemma2" else None,
        softcap=getattr(text, "final_logit_softcapping", None),
        query_key_value_bias=bias(attention, "q_proj", "qkv_proj"),
        attention_output_bias=bias(attention, "o_proj"),
        mlp_bias=bias(mlp, "down_proj"),
        norm_queries_and_keys=hasattr(attention, "q_norm"),
        norm_outputs=hasattr(layers[0], "pre_feedforward_layernorm"),
        fused_projections=fused,
        tie_word_embeddings=model.lm_head.weight is body.embed_tokens.weight,
        initializer_range=text.initializer_range,
        eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
        windows=windows,
        rope_of_layer=[sorted(set(kinds)).index(kind) for kind in kinds] if len(kinds) > 1
        else [0 if turns else None for turns in turned],
        embedding_scale=getattr(text, "embedding_multiplier", None),
        residual_scale=getattr(text, "residual_multiplier", None),
        logit_divisor=getattr(text, "logits_scaling", None),
        ropes=list(ropes.values()),
    )


def main():
    cases = []
    for family, entries in [(f, {}) for f in FAMILIES] + VARIANTS:
        entries = dict(model_type=family) | entries
        values = read(entries)
        saved = json.loads(load(entries).to_json_string())
        for key in ("vision_config", "id2label", "label2id"):
            saved.pop(key, None)
        assert read(saved) == values, (entries, saved)
        cases.append(dict(config=entries, saved=saved, read=values))
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    Path(__file__).with_name("configs.json").write_text(text)


if __name__ == "__main__":
    main()
