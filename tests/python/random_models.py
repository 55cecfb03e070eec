"""Tiny models of random numbers, made without torch: a config.json, and weights drawn in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.loading.loader import WeightStore

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-d64": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "llama2-d128": {
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "llama3-d64": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama3-d128": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral-d64": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 20,
    },
    "qwen2-d64": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 165,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3-d128": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "gemma3-d64": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
    "gemma3-d256": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
    "mixtral-d128": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3-moe-d64": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
}


def write_config(directory: Path, **changes: Any) -> Path:
    """Writes the config.json of a Llama of three layers; the directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 160,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def fill(weights: WeightStore, seed: int = 0) -> None:
    """Draws all weights so that activations and logits stay around 1 and every op matters."""
    rng = np.random.default_rng(seed)
    for name, shape in weights.shapes().items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("bias"):
            values /= 2
        elif len(shape) == 1:  # of a norm
            values = 1 + values / 10
        else:
            values *= 1.2 / shape[-1] ** 0.5
        weights.load(name, values)
