"""Configs and weights of mixtures of experts; what they say is in test_transformers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MixtralConfig, Qwen3MoeConfig

from mixtures import MIXTURES
from nanoflow.loading.checkpoint import open_checkpoint
from nanoflow.models import model_adapter
from test_transformers import Subject, all_logits, random_prompts
from tiny_models import tiny_llama, write_tiny_llama

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
}


def parse(config: dict[str, Any], **changes: Any) -> Any:
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    return model_adapter(config).parse_config(config)


def test_dimensions_of_mixtral() -> None:
    model = parse(MIXTRAL)
    assert (model.num_experts, model.experts_per_token, model.norm_topk_prob) == (8, 2, True)
    assert (model.intermediate_size, model.head_dim, model.qk_norm) == (14336, 128, False)
    assert model.architecture == "MixtralForCausalLM"
    spec = model.spec_arguments("bfloat16")
    assert (spec["num_experts"], spec["experts_per_token"], spec["norm_topk_prob"]) == (8, 2, True)
    assert parse(MIXTRAL, rope_theta="absent").rope == model.rope  # their default


def test_dimensions_of_qwen3_moe() -> None:
    model = parse(QWEN3)
    assert (model.num_experts, model.experts_per_token, model.norm_topk_prob) == (128, 8, True)
    assert (model.intermediate_size, model.head_dim, model.qk_norm) == (768, 128, True)
    renamed = parse(QWEN3, num_experts="absent", num_local_experts=16)  # as transformers 5 saves it
    assert renamed.num_experts == 16
    assert not parse(QWEN3, norm_topk_prob="absent").norm_topk_prob
    assert parse(QWEN3, head_dim="absent").head_dim == 64


@pytest.mark.parametrize(
    ("config", "defaults"), [(MIXTRAL, MixtralConfig()), (QWEN3, Qwen3MoeConfig())]
)
def test_defaults_are_those_of_transformers(config: dict[str, Any], defaults: Any) -> None:
    optional = (
        ["num_local_experts", "num_experts_per_tok", "num_key_value_heads"]
        if config is MIXTRAL
        else ["num_experts", "num_experts_per_tok", "num_key_value_heads", "moe_intermediate_size"]
    )
    model = parse(config, **dict.fromkeys(optional, "absent"))
    assert model.num_experts == defaults.num_local_experts
    assert model.experts_per_token == defaults.num_experts_per_tok
    assert model.num_kv_heads == defaults.num_key_value_heads
    if config is QWEN3:
        assert model.intermediate_size == defaults.moe_intermediate_size


def test_windows_are_those_of_all_layers() -> None:
    assert parse(MIXTRAL).layer_windows == parse(QWEN3).layer_windows == ()
    assert parse(MIXTRAL, sliding_window=4096).layer_windows == (4096, 4096)
    window = {"sliding_window": 100, "max_window_layers": 48}  # which they do not heed
    assert parse(QWEN3, **window).layer_windows == ()
    assert parse(QWEN3, **window, use_sliding_window=True).layer_windows == (100,)


def test_rows_of_experts_lie_one_behind_the_other() -> None:
    adapter = model_adapter(MIXTRAL)
    model = parse(MIXTRAL)
    weights = adapter.checkpoint_weights(model)
    block = "model.layers.1.block_sparse_moe"
    assert weights[f"{block}.gate.weight"].shape == (8, 4096)
    [up] = weights[f"{block}.experts.3.w3.weight"].targets
    assert (up.name, up.row_begin, up.rows) == ("layers.1.up", 3 * 14336, 14336)
    [down] = weights[f"{block}.experts.7.w2.weight"].targets
    assert (down.name, down.row_begin, down.rows) == ("layers.1.down", 7 * 4096, 4096)
    names = set(weights)
    assert adapter.stored_weights(model, names - {f"{block}.gate.weight"}) == weights
    fused = adapter.stored_weights(model, {f"model.layers.{n}.mlp.gate.weight" for n in range(2)})
    assert fused["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 28672, 4096)
    assert len(fused["model.layers.1.mlp.experts.gate_up_proj"].targets) == 16


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts=0 .* not a positive integer"),
        (MIXTRAL, {"num_experts_per_tok": 2.5}, "num_experts_per_tok=2.5 .* not a positive int"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
        (MIXTRAL, {"mlp_bias": True}, "mlp_bias=True is not supported for MixtralForCausalLM"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (MIXTRAL, {"intermediate_size": "absent"}, "intermediate_size"),
        (QWEN3, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] are not supported for Qwen3Moe"),
        (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 .* every layer must have exp"),
        (QWEN3, {"moe_intermediate_size": -1}, "intermediate_size=-1 .* not a positive integer"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True is not supported"),
    ],
)
def test_what_is_not_supported_is_named(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(config, **changes)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe-raw"])
def test_experts_fused_in_the_checkpoint_give_the_same_logits(tmp_path: Path, variant: str) -> None:
    single = write_tiny_llama(tmp_path / "single", **MIXTURES[variant])
    tiny_llama(**MIXTURES[variant]).save_pretrained(
        tmp_path / "fused", save_original_format=False, max_shard_size="50KB"
    )
    [tokens] = random_prompts((20,))
    results = []
    for model, names in ((single, "experts.0."), (tmp_path / "fused", "experts.gate_up_proj")):
        assert any(names in name for name in open_checkpoint(model).tensors())
        results.append(all_logits(Subject(model, "cpu").engine("sequential"), tokens))
    np.testing.assert_array_equal(results[0], results[1])
