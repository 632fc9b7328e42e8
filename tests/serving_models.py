"""A tiny packed model with a tokenizer and a chat template, made in a moment: random weights, one token a byte."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megalith.converter.convert import convert

VOCAB_SIZE = 272
EOS, TEXT = 2, 16  # special tokens come first, then 256 bytes from TEXT on
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Byte-level without merges: one token a byte."""
    specials = ["<pad>", "<s>", "</s>", *(f"<extra_{i}>" for i in range(TEXT - 3))]
    vocab = {text: i for i, text in enumerate(specials)}
    vocab |= {character: TEXT + i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return tokenizer


def checkpoint(folder: Path, max_seq_len: int = 2048, template: str | None = TEMPLATE) -> Path:
    """A Llama of one layer."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, head_dim = 32, 48, 16
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": head_dim, "hidden_act": "silu", "max_position_embeddings": max_seq_len, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden),
        "model.layers.0.self_attn.q_proj.weight": (2 * head_dim, hidden),
        "model.layers.0.self_attn.k_proj.weight": (head_dim, hidden),
        "model.layers.0.self_attn.v_proj.weight": (head_dim, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, 2 * head_dim),
        "model.layers.0.mlp.gate_proj.weight": (inner, hidden),
        "model.layers.0.mlp.up_proj.weight": (inner, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, inner),
        "lm_head.weight": (VOCAB_SIZE, hidden),
    }
    source = np.random.default_rng(7)
    tensors = {name: source.normal(0, 0.5, shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        tensors[f"{name}.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def serving_model(folder: Path, max_seq_len: int = 2048, template: str | None = TEMPLATE) -> Path:
    """It, packed, as tiny.lith."""
    target = folder / "tiny.lith"
    convert(checkpoint(folder / "tiny", max_seq_len, template), target, None, force=True)
    return target
