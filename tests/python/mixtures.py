"""Mixtures of experts as `tiny_models.tiny_llama` makes them."""

from __future__ import annotations

from typing import Any

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "family": "Mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 21,
    },
    "mixtral-d128": {
        "family": "Mixtral",
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 128,
        "initializer_range": 0.08,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3-moe-d64": {
        "family": "Qwen3Moe",
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.1,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "qwen3-moe-raw": {
        "family": "Qwen3Moe",
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "use_sliding_window": True,
        "sliding_window": 16,
    },
}
