"""Rotary frequencies with their scaling, from either spelling of a Hugging Face config.

Two of transformers' scalings change with the length of a sequence. Here, as in vLLM, one table
serves all requests of an engine, chosen by its `max_model_len`: "longrope" takes its long factors
where that is above original_max_position_embeddings, and "dynamic" scales as transformers does for
a sequence of that length (up to max_position_embeddings: not at all).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

DEFAULT_THETA = 10000.0
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class _Keys:
    needed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_TYPE_KEYS: Mapping[str, _Keys] = MappingProxyType(
    {
        "default": _Keys(),
        "linear": _Keys(frozenset({"factor"})),
        "dynamic": _Keys(frozenset({"factor"}), frozenset({_ORIGINAL})),
        "yarn": _Keys(
            frozenset({"factor", _ORIGINAL}),
            frozenset({"attention_factor", "beta_fast", "beta_slow", "truncate"})
            | {"mscale", "mscale_all_dim"},
        ),
        "llama3": _Keys(frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL})),
        "longrope": _Keys(
            frozenset({"short_factor", "long_factor", "factor", _ORIGINAL}),
            frozenset({"attention_factor"}),
        ),
        "frequency_factors": _Keys(frozenset({"frequency_factors"})),
    }
)
_OLD_NAMES: Mapping[str, str] = MappingProxyType({"su": "longrope"})


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings as one flat dict with `rope_type` and `rope_theta`.

    Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it). The
    type "frequency_factors" is ours: a GGUF file holds one divisor per frequency, no formula.
    Raises ValueError on a type, a key or a partial rotation that is not supported.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"rope settings {found!r} in the model config are no object")
    stated = dict(found)
    if any(isinstance(value, Mapping) for value in stated.values()):
        raise ValueError(f"rope_parameters per layer type are not supported: {sorted(stated)}")
    rope_type: Any = stated.get("rope_type", stated.get("type", "default"))
    rope_type = _OLD_NAMES.get(rope_type, rope_type)
    if rope_type not in _TYPE_KEYS:
        raise ValueError(
            f"rope type {rope_type!r} is not supported; supported are {sorted(_TYPE_KEYS)}"
        )
    theta = stated.get("rope_theta", config.get("rope_theta"))
    partial = stated.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={partial} is not supported, only 1.0 is")
    keys = _TYPE_KEYS[rope_type]
    if unknown := sorted(set(stated) - _COMMON_KEYS - keys.needed - keys.optional):
        raise ValueError(f"rope type {rope_type!r} does not know the settings {unknown}")
    stated["rope_type"] = rope_type
    stated["rope_theta"] = DEFAULT_THETA if theta is None else float(theta)
    _fill_in(stated, keys, config)
    if missing := sorted(key for key in keys.needed if stated.get(key) is None):
        raise ValueError(f"rope type {rope_type!r} needs {missing}, which the config lacks")
    for key in ("factor", "attention_factor"):
        value = stated.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{key}={value!r} of rope type {rope_type!r} is no positive number")
    return stated


def _fill_in(stated: dict[str, Any], keys: _Keys, config: Mapping[str, Any]) -> None:
    """What transformers takes from elsewhere in the config."""
    positions = config.get("max_position_embeddings")
    if _ORIGINAL in keys.needed:
        outside = config.get(_ORIGINAL)
        if outside is not None:
            stated[_ORIGINAL] = outside
        elif stated.get(_ORIGINAL) is None:
            stated[_ORIGINAL] = positions
    if stated["rope_type"] == "longrope" and stated.get("factor") is None:
        original = stated.get(_ORIGINAL)
        stated["factor"] = positions / original if positions and original else None


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of a model's heads by their positions."""

    parameters: Mapping[str, Any]  # from rope_parameters()
    head_dim: int
    max_position_embeddings: int  # of the config

    @property
    def max_positions(self) -> int:
        """Positions the scaling makes of those the model was trained for, as vLLM counts them."""
        p = self.parameters
        if p["rope_type"] in ("linear", "dynamic"):
            return int(self.max_position_embeddings * p["factor"])
        if p["rope_type"] == "yarn":
            return int(p[_ORIGINAL] * p["factor"])
        return self.max_position_embeddings

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        p = self.parameters
        if p["rope_type"] not in ("yarn", "longrope"):
            return 1.0
        if p.get("attention_factor") is not None:
            return float(p["attention_factor"])
        factor = p["factor"]
        if p["rope_type"] == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(p[_ORIGINAL])) if factor > 1 else 1.0
        if p.get("mscale") and p.get("mscale_all_dim"):
            return _yarn_scale(factor, p["mscale"]) / _yarn_scale(factor, p["mscale_all_dim"])
        return _yarn_scale(factor)

    def inv_freq(self, max_model_len: int | None = None) -> Floats:
        """[head_dim / 2] radians per position, for an engine of this max_model_len (None: as long
        as the model allows).

        The powers are taken in float64 and rounded once; all else is float32, step by step as in
        transformers' modeling_rope_utils, so that both agree to the last bit or two.
        """
        p, length = self.parameters, max_model_len or self.max_positions
        match p["rope_type"]:
            case "linear":
                return self._unscaled() / np.float32(p["factor"])
            case "dynamic":
                return np.float32(1) / self._powers(self._dynamic_theta(length))
            case "yarn":
                return self._yarn()
            case "llama3":
                return _scale_llama3(self._unscaled(), p)
            case "longrope":
                name = "long_factor" if length > p[_ORIGINAL] else "short_factor"
                return np.float32(1) / (self._divisors(name) * self._powers(p["rope_theta"]))
            case "frequency_factors":
                return self._unscaled() / self._divisors("frequency_factors")
            case _:
                return self._unscaled()

    def _powers(self, theta: float) -> Floats:
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        powers = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64))
        return powers.astype(np.float32)

    def _unscaled(self) -> Floats:
        return np.float32(1) / self._powers(self.parameters["rope_theta"])

    def _divisors(self, name: str) -> Floats:
        divisors = np.asarray(self.parameters[name], np.float32)
        if divisors.shape != (self.head_dim // 2,) or not np.all(divisors > 0):
            raise ValueError(
                f"rope {name} must be {self.head_dim // 2} "
                f"positive numbers for head_dim {self.head_dim}, got {divisors.size}"
            )
        return divisors

    def _dynamic_theta(self, length: int) -> float:
        factor, trained = self.parameters["factor"], self.max_position_embeddings
        stretch = factor * max(length, trained) / trained - (factor - 1)
        theta: float = self.parameters["rope_theta"]
        return float(theta * stretch ** (self.head_dim / (self.head_dim - 2)))

    def _yarn(self) -> Floats:
        """Interpolates what turns rarely, keeps what turns often (arXiv 2309.00071, section 3)."""
        p = self.parameters
        theta, context = p["rope_theta"], p[_ORIGINAL]

        def dimension(rotations: float) -> float:
            turns = math.log(context / (rotations * 2 * math.pi))
            return self.head_dim * turns / (2 * math.log(theta))

        low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        steps = np.arange(self.head_dim // 2, dtype=np.float32) - np.float32(low)
        ramp = np.clip(steps / np.float32(high - low if high != low else 0.001), 0, 1)
        kept = np.float32(1) - ramp
        powers = self._powers(theta)
        interpolated = np.float32(1) / (np.float32(p["factor"]) * powers)
        inv_freq: Floats = interpolated * (np.float32(1) - kept) + np.float32(1) / powers * kept
        return inv_freq


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scale_llama3(inv_freq: Floats, parameters: Mapping[str, Any]) -> Floats:
    """Llama 3.1's rule: keep short wavelengths, divide long ones by `factor`, blend in between."""
    factor = np.float32(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters[_ORIGINAL])
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
