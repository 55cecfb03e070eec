"""GGUF metadata -> the Hugging Face config and generation config of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ARCHITECTURE = "llama"


def hf_config(
    metadata: Mapping[str, Any], *, has_output: bool, rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """A config dict as in a config.json of LlamaForCausalLM.

    `has_output`: whether the file holds output.weight; without it the embeddings are tied.
    `rope_factors`: the numbers of rope_freqs.weight, by which rotary frequencies are divided.
    Raises ValueError naming a missing key or what is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"GGUF architecture {architecture!r} is not supported; supported: {ARCHITECTURE}"
        )
    _check_traits(metadata)
    num_heads = _required(metadata, "attention.head_count")
    num_kv_heads = metadata.get(f"{ARCHITECTURE}.attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise ValueError("head counts that differ from layer to layer are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = metadata.get(f"{ARCHITECTURE}.vocab_size", len(tokens) if tokens else None)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": _required(metadata, "embedding_length"),
        "intermediate_size": _required(metadata, "feed_forward_length"),
        "num_hidden_layers": _required(metadata, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": _head_dim(metadata),
        "hidden_act": "silu",
        "rms_norm_eps": _required(metadata, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not has_output,
        "max_position_embeddings": _required(metadata, "context_length"),
        "rope_parameters": _rope(metadata, rope_factors),
        "dtype": "bfloat16",
    }
    return config | token_ids(metadata)


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (an id, or a list when the file names several), pad_token_id."""
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    unique_ends = list(dict.fromkeys(end for end in ends if end is not None))
    ids = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": unique_ends[0] if len(unique_ends) == 1 else unique_ends or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    value = metadata.get(f"{ARCHITECTURE}.{key}")
    if value is None:
        raise ValueError(f"the metadata lack {ARCHITECTURE}.{key}")
    return value


def _check_traits(metadata: Mapping[str, Any]) -> None:
    for key in ("expert_count", "attention.sliding_window"):
        if value := metadata.get(f"{ARCHITECTURE}.{key}"):
            raise ValueError(f"{ARCHITECTURE}.{key}={value} is not supported")
    for key in ("logit_scale", "embedding_scale", "residual_scale", "attention.scale"):
        value = metadata.get(f"{ARCHITECTURE}.{key}")
        if value not in (None, 0, 1):
            raise ValueError(f"{ARCHITECTURE}.{key}={value} is not supported")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(f"the model is split over {parts} files; merge them into one first")


def _head_dim(metadata: Mapping[str, Any]) -> Any:
    """The width of a head, or None when the file does not state it."""
    sizes = {
        key: metadata.get(f"{ARCHITECTURE}.{key}")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    stated = {key: size for key, size in sizes.items() if size is not None}
    if len(set(stated.values())) > 1:
        raise ValueError(
            f"keys, values and rotations of different width are not supported: {stated}"
        )
    return next(iter(stated.values()), None)


def _rope(metadata: Mapping[str, Any], factors: Sequence[float] | None) -> dict[str, Any]:
    scaling = metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    factor = metadata.get(f"{ARCHITECTURE}.rope.scaling.factor", 1.0)
    old_factor = metadata.get(f"{ARCHITECTURE}.rope.scale_linear", 1.0)
    if scaling not in ("none", "linear") or factor not in (0.0, 1.0) or old_factor != 1.0:
        raise ValueError(
            f"rope scaling {scaling!r} with factor {factor * old_factor} is not supported"
        )
    theta = metadata.get(f"{ARCHITECTURE}.rope.freq_base", 10000.0)
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "frequency_factors",
        "rope_theta": theta,
        "frequency_factors": list(factors),
    }
