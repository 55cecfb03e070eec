"""Configs to dimensions and traits: every spelling, every default, and what is not supported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanoflow.models import model_adapter, supported_architectures

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> Any:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    return model_adapter(config).parse_config(config)


def test_dimensions_and_defaults() -> None:
    model = parse()
    assert (model.num_layers, model.num_heads, model.num_kv_heads) == (32, 32, 8)
    assert (model.head_dim, model.tie_word_embeddings) == (128, False)
    assert parse(num_key_value_heads="absent").num_kv_heads == 32
    assert parse(head_dim=64).head_dim == 64
    assert parse(head_dim=None).head_dim == 128
    assert parse(rms_norm_eps="absent").rms_norm_eps == 1e-6
    assert parse(max_position_embeddings="absent").max_position_embeddings == 2048
    spec = model.spec_arguments("float16")
    assert spec["dtype"] == "float16" and len(spec["rope_inv_freq"]) == 64
    assert "max_position_embeddings" not in spec


LONGROPE = {
    "short_factor": [1.0 + i / 40 for i in range(32)],
    "long_factor": [1.5 + i for i in range(32)],
}
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 500000.0},
    "theta and null": {"rope_theta": 100000, "rope_scaling": None},
    "llama3 as before": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama3, oldest key": {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
    "default of transformers 5": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}
    },
    "llama3 of transformers 5": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 32.0}
    },
}


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, oldest key": {"type": "linear", "factor": 2},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn of the config's positions": {"rope_type": "yarn", "factor": 4.0},
    "yarn with all": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.9,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 512,
    },
    "yarn with its attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 0.8,
        "original_max_position_embeddings": 512,
    },
    "longrope": {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 128},
    "longrope by its old name": {
        "type": "su",
        **LONGROPE,
        "factor": 16.0,
        "original_max_position_embeddings": 128,
    },
    "longrope with its attention factor": {
        "rope_type": "longrope",
        **LONGROPE,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 128,
    },
}


def check_rope(length: int | None, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Against what transformers rotates a sequence of `length` tokens with."""
    spoken = {**config, **settings}
    if (spoken.get("rope_scaling") or {}).get("type") == "su":  # which transformers has forgotten
        spoken["rope_scaling"] = {**spoken["rope_scaling"], "rope_type": "longrope"}
    embedding = LlamaRotaryEmbedding(
        LlamaConfig(**{k: v for k, v in spoken.items() if k != "architectures"})
    )
    model = parse(**config, **settings)
    positions = length or model.max_position_embeddings
    cosines, sines = embedding(torch.zeros(1), torch.arange(positions)[None])
    got = model.spec_arguments("float32", length)
    # torch's float32 power is off by a unit in the last place now and then.
    frequencies = np.asarray(got["rope_inv_freq"], np.float32)
    np.testing.assert_array_max_ulp(frequencies, embedding.inv_freq.numpy(), maxulp=3)
    last = (positions - 1) * frequencies.astype(np.float64)
    for ours, theirs in ((np.cos(last), cosines), (np.sin(last), sines)):
        expected = theirs[0, -1, : len(last)].numpy()
        ours = ours * got["rope_attention_factor"]
        np.testing.assert_allclose(ours, expected, atol=positions * 4e-7)


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_frequencies_are_those_of_transformers(case: str, head_dim: int) -> None:
    check_rope(None, ROPES[case], CONFIG | {"head_dim": head_dim, "max_position_embeddings": 4096})


@pytest.mark.parametrize("length", [None, 100, 512, 700])
@pytest.mark.parametrize("case", SCALINGS)
def test_scaled_rotations_are_those_of_transformers_for_a_sequence(
    case: str, length: int | None
) -> None:
    config = CONFIG | {"head_dim": 64, "max_position_embeddings": 512}
    check_rope(length, {"rope_theta": 10000.0, "rope_scaling": SCALINGS[case]}, config)


def test_scalings_stretch_the_positions_of_a_model() -> None:
    def positions(**scaling: Any) -> int:
        model = parse(max_position_embeddings=512, rope_scaling=scaling)
        return int(model.max_position_embeddings)

    assert positions(rope_type="linear", factor=4.0) == 2048
    assert positions(rope_type="dynamic", factor=2.5) == 1280
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=256) == 1024
    assert positions(rope_type="llama3", **LLAMA3) == 512
    longrope = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    assert positions(rope_type="longrope", **longrope) == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "absent"}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "should list one of"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' .* no number of at least 0"),
        ({"rope_scaling": 8}, "rope settings 8 .* are no object"),
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported; supp"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported; supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope type 'linear' needs \['factor'\]"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor='2' .* positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 of rope type 'linear' is no"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"needs \['long_factor', 'short_factor'\]"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 64}},
            "short_factor must be 64 positive numbers for head_dim 128, got 1",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs .*'high_freq_factor'"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "new": 1}}, r"settings \['new'\]"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"vocab_size": "absent"}, "lacks 'vocab_size'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 .* not a positive integer"),
        ({"hidden_size": 4096.5}, "hidden_size=4096.5 .* not a positive integer"),
        (
            {"num_key_value_heads": 5},
            "num_key_value_heads=5 does not divide num_attention_heads=32",
        ),
        ({"hidden_size": 4097}, "num_attention_heads=32 does not divide hidden_size=4097"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**changes)


def test_full_attention_in_every_layer_is_no_trait() -> None:
    assert parse(layer_types=["full_attention"] * 32).num_layers == 32


def test_supported_architectures() -> None:
    assert supported_architectures() == (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
        "Gemma3ForCausalLM",
    )


def test_qwen2_has_a_bias_on_q_k_and_v() -> None:
    model = parse(architectures=["Qwen2ForCausalLM"], num_hidden_layers=1)
    assert model.qkv_bias and model.spec_arguments("bfloat16")["qkv_bias"]
    assert model.architecture == "Qwen2ForCausalLM"
    weights = model_adapter(CONFIG).checkpoint_weights(model)
    biases = {name: weight for name, weight in weights.items() if name.endswith(".bias")}
    assert [weight.shape for weight in biases.values()] == [(4096,), (1024,), (1024,)]
    targets = [target for weight in biases.values() for target in weight.targets]
    assert {target.name for target in targets} == {"layers.0.qkv_bias"}
    assert [target.row_begin for target in targets] == [0, 4096, 5120]
    assert not parse().qkv_bias


def test_qwen3_norms_each_head_of_q_and_k() -> None:
    model = parse(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1, hidden_size=1024)
    assert model.qk_norm and not model.qkv_bias and model.spec_arguments("bfloat16")["qk_norm"]
    assert model.head_dim == 128  # their default, where others divide hidden_size
    weights = model_adapter(CONFIG).checkpoint_weights(model)
    for name in ("q_norm", "k_norm"):
        weight = weights[f"model.layers.0.self_attn.{name}.weight"]
        assert weight.shape == (128,)
        assert [target.name for target in weight.targets] == [f"layers.0.{name}"]
    assert not parse().qk_norm


GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 7,
    "num_key_value_heads": "absent",
    "sliding_window": 512,
}


def test_gemma3_has_two_ropes_and_slides_in_five_layers_of_six() -> None:
    model = parse(**GEMMA3)
    assert model.layer_windows == (512,) * 5 + (0, 512)
    assert (model.head_dim, model.num_kv_heads, model.tie_word_embeddings) == (256, 4, True)
    spec = model.spec_arguments("float32")
    assert spec["embed_scale"] == 64 and spec["attention_scale"] == 1 / 16
    assert spec["activation"] == "gelu_tanh" and spec["norm_unit_offset"] and spec["post_norms"]
    assert spec["rope_inv_freq"][1] == pytest.approx(1e6 ** (-1 / 128), rel=1e-6)
    assert spec["rope_local_inv_freq"][1] == pytest.approx(1e4 ** (-1 / 128), rel=1e-6)
    old = parse(
        **GEMMA3,
        rope_theta=5e5,
        rope_local_base_freq=2e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
        query_pre_attn_scalar=64,
    )
    new = parse(
        **GEMMA3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        layer_types=["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
        query_pre_attn_scalar=64,
    )
    assert old.spec_arguments("float32") == new.spec_arguments("float32")
    assert new.max_position_embeddings == 131072  # which the factor is part of already


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "silu"}, "only 'gelu_pytorch_tanh' is"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
        ({"sliding_window": None}, "lacks 'sliding_window'"),
        ({"layer_types": ["full_attention"]}, "for each of 7 layers"),
        ({"rope_parameters": {"rope_type": "default"}}, "not those of full_attention, sliding"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "a yarn rope of windows is not supported",
        ),
    ],
)
def test_what_gemma3_does_not_compute_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**GEMMA3 | changes)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_layers_of_qwen_slide_from_max_window_layers_on_if_asked_to(family: str) -> None:
    qwen = {"architectures": [f"{family}ForCausalLM"], "sliding_window": 1024}
    assert parse(**qwen, use_sliding_window=False).layer_windows == ()
    assert parse(**qwen).layer_windows == ()  # their default
    qwen["use_sliding_window"] = True
    assert parse(**qwen).layer_windows == (0,) * 28 + (1024,) * 4
    assert parse(**qwen, max_window_layers=2).layer_windows == (0,) * 2 + (1024,) * 30
    assert parse(**qwen, max_window_layers=32).layer_windows == ()
    types = ["sliding_attention", "full_attention"]
    assert parse(**qwen, layer_types=types, num_hidden_layers=2).layer_windows == (1024, 0)
    with pytest.raises(ValueError, match="must name full_attention or sliding_attention for each"):
        parse(**qwen, layer_types=types)


def test_all_layers_of_mistral_slide_unless_its_config_says_null() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": "absent"}
    assert parse(**mistral, sliding_window=None).layer_windows == ()
    assert parse(**mistral, sliding_window=None).num_kv_heads == 8
    assert parse(**mistral).layer_windows == (4096,) * 32  # their default
    assert parse(**mistral, sliding_window=100).spec_arguments("float16")["layer_windows"][0] == 100
    with pytest.raises(ValueError, match=r"sliding_window=-1 .* not a positive integer"):
        parse(**mistral, sliding_window=-1)
