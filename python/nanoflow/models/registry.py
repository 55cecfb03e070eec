"""Architecture name -> adapter."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nanoflow.models import gemma3, llama, moe
from nanoflow.models.config import CheckpointWeight, ModelConfig


@dataclass(frozen=True, slots=True)
class ModelAdapter:
    """What a model family must say about itself."""

    parse_config: Callable[[Mapping[str, Any]], ModelConfig]
    checkpoint_weights: Callable[[ModelConfig], dict[str, CheckpointWeight]]
    is_ignored: Callable[[ModelConfig, str], bool]  # a tensor that may be present but is not read
    # The same as checkpoint_weights for checkpoints that hold the weights in another form.
    other_weights: Callable[[ModelConfig], dict[str, CheckpointWeight]] | None = None

    def stored_weights(
        self, model: ModelConfig, names: Container[str]
    ) -> dict[str, CheckpointWeight]:
        """What a checkpoint with tensors of these names must hold: the form that fits them best."""
        forms = [self.checkpoint_weights(model)]
        if self.other_weights is not None:
            forms.append(self.other_weights(model))
        return max(forms, key=lambda weights: sum(name in names for name in weights) / len(weights))


_LLAMA = ModelAdapter(llama.parse_config, llama.checkpoint_weights, llama.is_ignored)
_MOE = ModelAdapter(
    moe.parse_config, moe.checkpoint_weights, llama.is_ignored, moe.fused_checkpoint_weights
)

_ADAPTERS: Mapping[str, ModelAdapter] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": _LLAMA,
        "Qwen3ForCausalLM": _LLAMA,
        "MixtralForCausalLM": _MOE,
        "Qwen3MoeForCausalLM": _MOE,
        "Gemma3ForCausalLM": ModelAdapter(
            gemma3.parse_config, llama.checkpoint_weights, llama.is_ignored
        ),
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
    if not names or isinstance(names, str):
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
