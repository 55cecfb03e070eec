"""Rotary frequencies with their scaling, from either spelling of a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_THETA = 10000.0
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LLAMA3_KEYS = frozenset(
    {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
)
_TYPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "llama3": _LLAMA3_KEYS,
    "frequency_factors": frozenset({"frequency_factors"}),
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings as one flat dict with `rope_type` and `rope_theta`.

    Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it). The
    type "frequency_factors" is ours: a GGUF file holds one divisor per frequency, no formula.
    Raises ValueError on a type, a key or a partial rotation that is not supported.
    """
    stated = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in stated.values()):
        raise ValueError(f"rope_parameters per layer type are not supported: {sorted(stated)}")
    rope_type: Any = stated.get("rope_type", stated.get("type", "default"))
    if rope_type not in _TYPE_KEYS:
        raise ValueError(
            f"rope type {rope_type!r} is not supported; supported are {sorted(_TYPE_KEYS)}"
        )
    theta = stated.get("rope_theta", config.get("rope_theta"))
    partial = stated.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={partial} is not supported, only 1.0 is")
    if unknown := sorted(set(stated) - _COMMON_KEYS - _TYPE_KEYS[rope_type]):
        raise ValueError(f"rope type {rope_type!r} does not know the settings {unknown}")
    stated["rope_type"] = rope_type
    stated["rope_theta"] = DEFAULT_THETA if theta is None else float(theta)
    if rope_type == "llama3" and stated.get("original_max_position_embeddings") is None:
        stated["original_max_position_embeddings"] = config.get("max_position_embeddings")
    if missing := sorted(k for k in _TYPE_KEYS[rope_type] if stated.get(k) is None):
        raise ValueError(f"rope type {rope_type!r} needs {missing}, which the config lacks")
    return stated


def rope_inv_freq(parameters: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """[head_dim / 2] radians per position, from what `rope_parameters` returned.

    The powers are taken in float64 and rounded once; all else is float32, step by step as in
    transformers' modeling_rope_utils, so that both agree to the last bit or two.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.float64(np.float32(parameters["rope_theta"]))
    powers = np.power(base, exponent.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1) / powers
    if parameters["rope_type"] == "llama3":
        return _scale_llama3(inv_freq, parameters)
    if parameters["rope_type"] == "frequency_factors":
        factors = np.asarray(parameters["frequency_factors"], np.float32)
        if factors.shape != inv_freq.shape or not np.all(factors > 0):
            raise ValueError(
                f"rope frequency factors must be {inv_freq.size} positive numbers for "
                f"head_dim {head_dim}, got {factors.size}"
            )
        return inv_freq / factors
    return inv_freq


def _scale_llama3(
    inv_freq: NDArray[np.float32], parameters: Mapping[str, Any]
) -> NDArray[np.float32]:
    """Llama 3.1's rule: keep short wavelengths, divide long ones by `factor`, blend in between."""
    factor = np.float32(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    if factor < 1 or not 0 < low < high:
        raise ValueError(
            "llama3 rope scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor, got "
            f"factor={factor}, low_freq_factor={low}, high_freq_factor={high}"
        )
    wavelength = np.float32(2 * math.pi) / inv_freq
    is_long = wavelength > np.float32(context / low)
    is_short = wavelength < np.float32(context / high)
    scaled = np.where(is_long, inv_freq / factor, inv_freq)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    return np.where(is_long | is_short, scaled, blended)
