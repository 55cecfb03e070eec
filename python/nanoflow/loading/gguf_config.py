"""GGUF metadata -> the Hugging Face config and generation config of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ARCHITECTURES = ("llama", "gemma3")
_GEMMA3_27B_LAYERS = 62


def hf_config(
    metadata: Mapping[str, Any], *, has_output: bool, rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """A config dict as in a config.json of LlamaForCausalLM or Gemma3ForCausalLM.

    `has_output`: whether the file holds output.weight; without it the embeddings are tied.
    `rope_factors`: the numbers of rope_freqs.weight, by which rotary frequencies are divided.
    Raises ValueError naming a missing key or what is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"GGUF architecture {architecture!r} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
        )
    _check_traits(metadata)
    num_heads = _required(metadata, "attention.head_count")
    num_kv_heads = _stated(metadata, "attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise ValueError("head counts that differ from layer to layer are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = _stated(metadata, "vocab_size", len(tokens) if tokens else None)
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
        "dtype": "bfloat16",
    }
    if architecture == "gemma3":
        config |= _gemma3(metadata, config)
    else:
        config["rope_parameters"] = _rope(metadata, rope_factors)
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


def _gemma3(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What sets Gemma 3 apart. Its files do not state the pattern of its windows, their
    frequencies, nor that the largest model alone scales its scores by hidden_size over heads."""
    scaling = _stated(metadata, "rope.scaling.type", "none")
    full = {"rope_type": "default", "rope_theta": _stated(metadata, "rope.freq_base", 1e6)}
    if scaling == "linear":
        full |= {"rope_type": "linear", "factor": _required(metadata, "rope.scaling.factor")}
    elif scaling != "none":
        raise ValueError(f"rope scaling {scaling!r} is not supported for gemma3")
    is_largest = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": _required(metadata, "attention.sliding_window"),
        "query_pre_attn_scalar": width if is_largest else config["head_dim"] or width,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _stated(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"{metadata['general.architecture']}.{key}", default)


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    value = _stated(metadata, key)
    if value is None:
        raise ValueError(f"the metadata lack {metadata['general.architecture']}.{key}")
    return value


def _check_traits(metadata: Mapping[str, Any]) -> None:
    architecture = metadata["general.architecture"]
    windows = ["attention.sliding_window"] * (architecture == "llama")
    for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping", *windows):
        if value := _stated(metadata, key):
            raise ValueError(f"{architecture}.{key}={value} is not supported")
    for key in ("logit_scale", "embedding_scale", "residual_scale", "attention.scale"):
        value = _stated(metadata, key)
        if value not in (None, 0, 1):
            raise ValueError(f"{architecture}.{key}={value} is not supported")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(f"the model is split over {parts} files; merge them into one first")


def _head_dim(metadata: Mapping[str, Any]) -> Any:
    """The width of a head, or None when the file does not state it."""
    sizes = {
        key: _stated(metadata, key)
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    stated = {key: size for key, size in sizes.items() if size is not None}
    if len(set(stated.values())) > 1:
        raise ValueError(
            f"keys, values and rotations of different width are not supported: {stated}"
        )
    return next(iter(stated.values()), None)


def _rope(metadata: Mapping[str, Any], factors: Sequence[float] | None) -> dict[str, Any]:
    scaling = _stated(metadata, "rope.scaling.type", "none")
    factor = _stated(metadata, "rope.scaling.factor", 1.0)
    old_factor = _stated(metadata, "rope.scale_linear", 1.0)
    if scaling not in ("none", "linear") or factor not in (0.0, 1.0) or old_factor != 1.0:
        raise ValueError(
            f"rope scaling {scaling!r} with factor {factor * old_factor} is not supported"
        )
    theta = _stated(metadata, "rope.freq_base", 10000.0)
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "frequency_factors",
        "rope_theta": theta,
        "frequency_factors": list(factors),
    }
