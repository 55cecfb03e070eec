"""Gemma 3, text only: a Llama with scaled embeddings, norms of 1 + weight, also behind attention
and MLP and of each head, a GELU gate, and a window and frequencies of their own in most layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanoflow.models.config import ModelConfig
from nanoflow.models.llama import dimensions, layer_windows, positive_size
from nanoflow.models.rope import Rope, rope_parameters

# Of keys that a config leaves out, as transformers has them.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    }
)
_THETA: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "full_attention": ("rope_theta", 1_000_000.0),
        "sliding_attention": ("rope_local_base_freq", 10_000.0),
    }
)
# Traits of a config that change the computation, with the only value that is computed; an absent
# key or null counts as it.
_REQUIRED_TRAITS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "quantization_config": None,
    }
)


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Dimensions and traits from the Hugging Face config of a Gemma3ForCausalLM.

    Raises ValueError naming a key that is missing, a size that makes no sense, or a trait that is
    not supported.
    """
    architecture: str = config["architectures"][0]
    config = {**_DEFAULTS, **config}
    for key, supported in _REQUIRED_TRAITS.items():
        value = config.get(key)
        if value is not None and value != supported:
            raise ValueError(
                f"{key}={value!r} is not supported for {architecture}, only {supported!r} is"
            )
    sizes = dimensions(config)
    if config.get("layer_types") is None:
        period = positive_size(config, "sliding_window_pattern")
        config["layer_types"] = [
            "sliding_attention" if (i + 1) % period else "full_attention"
            for i in range(sizes["num_layers"])
        ]
    positive_size(config, "sliding_window")
    local = _rope(config, "sliding_attention", sizes["head_dim"])
    if local.attention_factor != 1:
        raise ValueError(f"a {local.parameters['rope_type']} rope of windows is not supported")
    return ModelConfig(
        architecture=architecture,
        **sizes,
        qkv_bias=False,
        qk_norm=True,
        rope=_rope(config, "full_attention", sizes["head_dim"]),
        max_position_embeddings=positive_size(config, "max_position_embeddings"),
        layer_windows=layer_windows(config, sizes["num_layers"]),
        rope_local=local,
        activation="gelu_tanh",
        embed_scale=math.sqrt(sizes["hidden_size"]),
        attention_scale=positive_size(config, "query_pre_attn_scalar") ** -0.5,
        norm_unit_offset=True,
        post_norms=True,
    )


def _rope(config: Mapping[str, Any], kind: str, head_dim: int) -> Rope:
    """Of the layers of a kind: rope_parameters by kind (transformers 5), or the keys before it."""
    by_kind = config.get("rope_parameters")
    theta_key, theta = _THETA[kind]
    if by_kind is None:
        stated = dict(config.get("rope_scaling") or {}) if kind == "full_attention" else {}
        stated["rope_theta"] = config.get(theta_key, theta)
    elif set(by_kind) <= set(_THETA):
        stated = {"rope_theta": theta, **(by_kind.get(kind) or {})}
    else:
        raise ValueError(f"rope_parameters={by_kind!r} are not those of {', '.join(_THETA)}")
    positions = positive_size(config, "max_position_embeddings")
    rope = Rope(
        rope_parameters({"rope_parameters": stated, "max_position_embeddings": positions}),
        head_dim,
        positions,
    )
    rope.inv_freq()  # raises what is wrong with it
    return rope
