"""Configs of tiny models without weights, for `load_format="dummy"`: no torch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Query heads to KV heads as in Llama 2 (one to one) and in Llama 3 (four to one).
SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 64, Llama 2": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "head_dim 128, Llama 3": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
}


def write_config(directory: Path, **changes: Any) -> Path:
    """Writes a Llama's config.json; the directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 160,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        **next(iter(SHAPES.values())),
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
