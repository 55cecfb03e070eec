"""Mixtures of experts: members of the Llama family with a router and experts in the MLP's place.

Mixtral is such a Mistral, Qwen3-MoE such a Qwen3. Every token goes to all the experts that its
router chooses, however many tokens they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from nanoflow.models import llama
from nanoflow.models.config import CheckpointWeight, ModelConfig, WeightTarget


@dataclass(frozen=True, slots=True)
class _Member:
    """What a mixture adds to a member of the Llama family, and how its checkpoints name that."""

    dense: str  # its architecture
    defaults: Mapping[str, Any]  # of keys that a config leaves out, as transformers has them
    size_key: str  # in a config: the intermediate size of an expert
    block: str  # of a layer, what holds gate.weight and experts
    gate: str
    up: str
    down: str


_MEMBERS: Mapping[str, _Member] = MappingProxyType(
    {
        "MixtralForCausalLM": _Member(
            dense="MistralForCausalLM",
            defaults={
                "sliding_window": None,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-5,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            size_key="intermediate_size",
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
        ),
        "Qwen3MoeForCausalLM": _Member(
            dense="Qwen3ForCausalLM",
            defaults={
                "num_key_value_heads": 4,
                "head_dim": None,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
            size_key="moe_intermediate_size",
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
        ),
    }
)
_DEFAULT_EXPERTS = 128  # of Qwen3-MoE, whose configs name the number in one of two ways


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Dimensions and traits from a Hugging Face config; errors as `llama.parse_config`."""
    architecture: str = config["architectures"][0]
    member = _MEMBERS[architecture]
    config = {**member.defaults, **config}
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError(
            f"decoder_sparse_step={config.get('decoder_sparse_step', 1)!r} and mlp_only_layers="
            f"{config.get('mlp_only_layers')!r} are not supported for {architecture}: every layer "
            "must have experts"
        )
    experts = config.get("num_local_experts", config.get("num_experts", _DEFAULT_EXPERTS))
    active = config["num_experts_per_tok"]
    for key, count in (("num_local_experts", experts), ("num_experts_per_tok", active)):
        if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
            raise ValueError(f"{key}={count!r} in the model config is not a positive integer")
    if active > experts:
        raise ValueError(f"num_experts_per_tok={active} is more than the {experts} experts")
    inner = config.get(member.size_key)
    # If there is a window, it is that of all layers.
    plain = {**config, "intermediate_size": inner, "max_window_layers": 0, "layer_types": None}
    return replace(
        llama.parse_config(plain, member.dense),
        num_experts=experts,
        experts_per_token=active,
        norm_topk_prob=bool(config["norm_topk_prob"]),
    )


def checkpoint_weights(model: ModelConfig) -> dict[str, CheckpointWeight]:
    """The tensors a checkpoint of this model holds: three for each expert."""
    return llama.checkpoint_weights(model, _expert_weights)


def fused_checkpoint_weights(model: ModelConfig) -> dict[str, CheckpointWeight]:
    """The same where one tensor holds gate and up of a layer's experts, another their down, as
    transformers 5 keeps them in memory."""
    return llama.checkpoint_weights(model, _fused_weights)


def _expert_weights(model: ModelConfig, layer: int) -> dict[str, CheckpointWeight]:
    member = _MEMBERS[model.architecture]
    hidden, inter = model.hidden_size, model.intermediate_size
    theirs, ours = f"model.layers.{layer}.{member.block}", f"layers.{layer}"
    weights = {f"{theirs}.gate.weight": _router(model, layer)}
    for e in range(model.num_experts):
        expert = f"{theirs}.experts.{e}"
        weights |= {
            f"{expert}.{member.gate}.weight": _rows(f"{ours}.gate", e, inter, hidden),
            f"{expert}.{member.up}.weight": _rows(f"{ours}.up", e, inter, hidden),
            f"{expert}.{member.down}.weight": _rows(f"{ours}.down", e, hidden, inter),
        }
    return weights


def _fused_weights(model: ModelConfig, layer: int) -> dict[str, CheckpointWeight]:
    experts, hidden, inter = model.num_experts, model.hidden_size, model.intermediate_size
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}"
    gate_up = tuple(
        WeightTarget(f"{ours}.{part}", e * inter, inter)
        for e in range(experts)
        for part in ("gate", "up")
    )
    down = (WeightTarget(f"{ours}.down", 0, experts * hidden),)
    return {
        f"{theirs}.gate.weight": _router(model, layer),
        f"{theirs}.experts.gate_up_proj": CheckpointWeight((experts, 2 * inter, hidden), gate_up),
        f"{theirs}.experts.down_proj": CheckpointWeight((experts, hidden, inter), down),
    }


def _router(model: ModelConfig, layer: int) -> CheckpointWeight:
    return _rows(f"layers.{layer}.router", 0, model.num_experts, model.hidden_size)


def _rows(name: str, index: int, rows: int, columns: int) -> CheckpointWeight:
    """The index-th matrix of as many rows."""
    return CheckpointWeight((rows, columns), (WeightTarget(name, index * rows, rows),))
