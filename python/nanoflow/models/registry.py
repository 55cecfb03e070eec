"""Architecture name -> adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nanoflow.models import llama
from nanoflow.models.config import CheckpointWeight, ModelConfig


@dataclass(frozen=True, slots=True)
class ModelAdapter:
    """What a model family must say about itself."""

    parse_config: Callable[[Mapping[str, Any]], ModelConfig]
    checkpoint_weights: Callable[[ModelConfig], dict[str, CheckpointWeight]]
    is_ignored: Callable[[ModelConfig, str], bool]  # a tensor that may be present but is not read


_LLAMA = ModelAdapter(llama.parse_config, llama.checkpoint_weights, llama.is_ignored)

_ADAPTERS: Mapping[str, ModelAdapter] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": _LLAMA,
        "Qwen3ForCausalLM": _LLAMA,
    }
)


def supported_architectures() -> tuple[str, ...]:
    """Names accepted in a config's `architectures`."""
    return tuple(_ADAPTERS)


def model_adapter(config: Mapping[str, Any]) -> ModelAdapter:
    """The adapter of the first architecture a Hugging Face config names.

    Raises ValueError naming the architecture and the supported ones.
    """
    names = config.get("architectures")
    if not names:
        raise ValueError(
            "the model config names no architecture: its 'architectures' should list one of "
            + ", ".join(_ADAPTERS)
        )
    adapter = _ADAPTERS.get(names[0])
    if adapter is None:
        raise ValueError(
            f"architecture {names[0]!r} is not supported; supported: {', '.join(_ADAPTERS)}"
        )
    return adapter
