"""The NumPy decoder against transformers: what other tests take for granted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
from nanoflow import _core
from tiny_models import tiny_llama


def fused_weights(model: Any) -> dict[str, NDArray[np.float32]]:
    """A transformers Llama, Qwen2 or Qwen3 by the names of `_core.Weights`."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    weights = {
        "embed": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
        "lm_head": state["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        for name, parts in {
            "input_norm": ["input_layernorm"],
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "o": ["self_attn.o_proj"],
            "post_norm": ["post_attention_layernorm"],
            "down": ["mlp.down_proj"],
        }.items():
            weights[target + name] = np.concatenate([state[f"{source}{p}.weight"] for p in parts])
        weights[target + "gate_up"] = reference.interleave(
            *(state[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up"))
        )
        if model.config.model_type == "qwen2":
            weights[target + "qkv_bias"] = np.concatenate(
                [state[f"{source}self_attn.{part}_proj.bias"] for part in "qkv"]
            )
        if model.config.model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[target + name] = state[f"{source}self_attn.{name}.weight"]
    return weights


@pytest.mark.parametrize(
    "tie_word_embeddings, family",
    [(False, "Llama"), (True, "Llama"), (False, "Qwen2"), (False, "Qwen3")],
)
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-4), ("bfloat16", 0.12)])
def test_llama_logits(dtype: str, atol: float, tie_word_embeddings: bool, family: str) -> None:
    head_dim = 16
    model = tiny_llama(
        family=family, dtype=dtype, tie_word_embeddings=tie_word_embeddings, head_dim=head_dim
    )
    config = model.config
    spec = _core.ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rope_inv_freq=(10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).tolist(),
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=family == "Qwen2",
        qk_norm=family == "Qwen3",
        dtype=dtype,
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 30)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    logits = reference.llama_logits(spec, fused_weights(model), tokens.tolist())
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits, expected, atol=atol)
