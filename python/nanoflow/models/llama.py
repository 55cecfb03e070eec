"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Mistral is a Llama with other defaults, Qwen2 one with a bias on q, k and v, Qwen3 one whose heads
of q and k are normed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nanoflow.models.config import CheckpointWeight, ModelConfig, WeightTarget
from nanoflow.models.rope import Rope, rope_parameters


@dataclass(frozen=True, slots=True)
class _Member:
    """What sets a member of the family apart."""

    defaults: Mapping[str, Any]  # of keys that a config leaves out, as transformers has them
    qkv_bias: bool = False
    qk_norm: bool = False
    has_windows: bool = False


_QWEN_WINDOWS: Mapping[str, Any] = MappingProxyType(
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
)
_MEMBERS: Mapping[str, _Member] = MappingProxyType(
    {
        "LlamaForCausalLM": _Member(defaults={"max_position_embeddings": 2048}),
        "MistralForCausalLM": _Member(
            defaults={
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                "max_position_embeddings": 131072,
            },
            has_windows=True,
        ),
        "Qwen2ForCausalLM": _Member(
            qkv_bias=True,
            has_windows=True,
            defaults={
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                **_QWEN_WINDOWS,
            },
        ),
        "Qwen3ForCausalLM": _Member(
            qk_norm=True,
            has_windows=True,
            defaults={
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 32768,
                **_QWEN_WINDOWS,
            },
        ),
    }
)
# Traits of a config that change the computation, with the only values this family computes.
# An absent key or null counts as the first value.
_REQUIRED_TRAITS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "layer_types": (None,),
}
_TWO_NORMS: Mapping[str, str] = MappingProxyType(
    {"input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
)
_FOUR_NORMS: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "o_norm",
        "pre_feedforward_layernorm": "post_norm",
        "post_feedforward_layernorm": "down_norm",
    }
)
_ROTARY_BUFFER = re.compile(
    r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)


def parse_config(config: Mapping[str, Any], member_name: str | None = None) -> ModelConfig:
    """Dimensions and traits from a Hugging Face config.

    `architectures` names a member of the family, or a variant of the member that is named. Raises
    ValueError naming a key that is missing, a size that makes no sense, or a trait that is not
    supported.
    """
    architecture: str = config["architectures"][0]
    member = _MEMBERS[member_name or architecture]
    config = {**member.defaults, **config}
    _check_traits(config, architecture, member.has_windows)
    sizes = dimensions(config)
    rope = Rope(
        rope_parameters(config), sizes["head_dim"], positive_size(config, "max_position_embeddings")
    )
    rope.inv_freq()  # raises what is wrong with it
    return ModelConfig(
        architecture=architecture,
        **sizes,
        qkv_bias=member.qkv_bias,
        qk_norm=member.qk_norm,
        rope=rope,
        max_position_embeddings=rope.max_positions,
        layer_windows=layer_windows(config, sizes["num_layers"]) if member.has_windows else (),
    )


def dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a ModelConfig that all families spell alike."""
    hidden_size = positive_size(config, "hidden_size")
    num_heads = positive_size(config, "num_attention_heads")
    num_kv_heads = positive_size(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads={num_kv_heads} does not divide num_attention_heads={num_heads}"
        )
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"num_attention_heads={num_heads} does not divide hidden_size={hidden_size}, "
            "and the config has no head_dim"
        )
    head_dim = positive_size(config, "head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary positions need an even one")
    return {
        "vocab_size": positive_size(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": positive_size(config, "intermediate_size"),
        "num_layers": positive_size(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _norm_eps(config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _norm_eps(config: Mapping[str, Any]) -> float:
    eps = config.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"rms_norm_eps={eps!r} in the model config is no number of at least 0")
    return float(eps)


def mlp_weights(model: ModelConfig, layer: int) -> dict[str, CheckpointWeight]:
    """Those of one layer's MLP."""
    hidden, inter = model.hidden_size, model.intermediate_size
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}"
    return {
        f"{theirs}.gate_proj.weight": _whole(f"{ours}.gate", inter, hidden),
        f"{theirs}.up_proj.weight": _whole(f"{ours}.up", inter, hidden),
        f"{theirs}.down_proj.weight": _whole(f"{ours}.down", hidden, inter),
    }


def checkpoint_weights(
    model: ModelConfig,
    mlp: Callable[[ModelConfig, int], dict[str, CheckpointWeight]] = mlp_weights,
) -> dict[str, CheckpointWeight]:
    """The tensors a checkpoint of this model holds, by their Hugging Face names.

    q, k and v become the rows of one tensor; csrc/model/weights.h names them all. `mlp` names those
    of what a layer has in the MLP's place.
    """
    hidden = model.hidden_size
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = {"model.embed_tokens.weight": _whole("embed", model.vocab_size, hidden)}
    for n in range(model.num_layers):
        theirs, ours = f"model.layers.{n}", f"layers.{n}"
        attn = f"{theirs}.self_attn"
        weights |= {
            f"{attn}.q_proj.weight": _rows(f"{ours}.qkv", 0, q_rows, hidden),
            f"{attn}.k_proj.weight": _rows(f"{ours}.qkv", q_rows, kv_rows, hidden),
            f"{attn}.v_proj.weight": _rows(f"{ours}.qkv", q_rows + kv_rows, kv_rows, hidden),
            f"{attn}.o_proj.weight": _whole(f"{ours}.o", hidden, q_rows),
            **mlp(model, n),
        }
        norms = _FOUR_NORMS if model.post_norms else _TWO_NORMS
        for name, own in norms.items():
            weights[f"{theirs}.{name}.weight"] = _whole(f"{ours}.{own}", hidden)
        if model.qkv_bias:
            weights |= {
                f"{attn}.q_proj.bias": _rows(f"{ours}.qkv_bias", 0, q_rows),
                f"{attn}.k_proj.bias": _rows(f"{ours}.qkv_bias", q_rows, kv_rows),
                f"{attn}.v_proj.bias": _rows(f"{ours}.qkv_bias", q_rows + kv_rows, kv_rows),
            }
        if model.qk_norm:
            weights |= {
                f"{attn}.q_norm.weight": _whole(f"{ours}.q_norm", model.head_dim),
                f"{attn}.k_norm.weight": _whole(f"{ours}.k_norm", model.head_dim),
            }
    weights["model.norm.weight"] = _whole("norm", hidden)
    if not model.tie_word_embeddings:
        weights["lm_head.weight"] = _whole("lm_head", model.vocab_size, hidden)
    return weights


def is_ignored(model: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may hold tensor `name` though nothing reads it."""
    if model.tie_word_embeddings and name == "lm_head.weight":
        return True
    return _ROTARY_BUFFER.fullmatch(name) is not None


def layer_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Of each layer: in all that layer_types calls sliding, else from max_window_layers on."""
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return ()
    window = positive_size(config, "sliding_window")
    types = config.get("layer_types")
    if types is None:
        full = config.get("max_window_layers") or 0
        types = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types={types!r} must name full_attention or sliding_attention for each of "
            f"{num_layers} layers"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()


def _check_traits(config: Mapping[str, Any], architecture: str, has_windows: bool) -> None:
    for key, supported in _REQUIRED_TRAITS.items():
        value = config.get(key)
        if has_windows and key in ("sliding_window", "layer_types"):
            continue
        if key == "layer_types" and value and set(value) == {"full_attention"}:
            continue
        if value is not None and value not in supported:
            raise ValueError(
                f"{key}={value!r} is not supported for {architecture}"
                + (f", only {supported[0]!r} is" if supported[0] is not None else "")
            )


def positive_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"the model config lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}={value!r} in the model config is not a positive integer")
    return value


def _whole(name: str, *shape: int) -> CheckpointWeight:
    return CheckpointWeight(shape, (WeightTarget(name, 0, shape[0]),))


def _rows(name: str, row_begin: int, rows: int, *columns: int) -> CheckpointWeight:
    return CheckpointWeight((rows, *columns), (WeightTarget(name, row_begin, rows),))
