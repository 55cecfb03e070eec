"""GGUF files: every tensor against transformers, configs from metadata, and broken files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_weights import FakeWeights, read
from nanoflow.bench.default_model import default_model
from nanoflow.loading import open_checkpoint
from nanoflow.loading.gguf import GgufFile, dequantize
from nanoflow.loading.gguf_config import hf_config, token_ids
from tiny_models import tiny_llama, write_gguf

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}


def transformers_state(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_equals_transformers(path: Path) -> None:
    expected = transformers_state(path)
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors()
    if checkpoint.model.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read(tensor), expected[name].numpy(), err_msg=name)


def test_smollm_is_bit_equal_to_transformers() -> None:
    assert_equals_transformers(default_model())


def test_smollm_config() -> None:
    checkpoint = open_checkpoint(default_model())
    model = checkpoint.model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (30, 576, 49152)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (9, 3, 64)
    assert model.tie_word_embeddings and model.max_position_embeddings == 8192
    assert checkpoint.resolve_dtype() == "bfloat16"
    assert checkpoint.resolve_dtype("float32") == "float32"
    assert checkpoint.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_bit_equal_to_transformers(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(num_heads=2, num_kv_heads=1, head_dim=32)
    path = tmp_path / "tiny.gguf"
    assert_equals_transformers(write_gguf(path, model, kind=gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_q_and_k_are_put_back(tmp_path: Path, tied: bool) -> None:
    """A file in F32 gives exactly the model it was made from, however it is cut into chunks."""
    model = tiny_llama(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    expected = model.state_dict()
    for name, tensor in open_checkpoint(path).tensors().items():
        np.testing.assert_array_equal(read(tensor), expected[name].numpy())
        np.testing.assert_array_equal(read(tensor, max_bytes=700), expected[name].numpy())


def test_config_is_that_of_the_model(tmp_path: Path) -> None:
    model = tiny_llama(rms_norm_eps=2e-5, rope_theta=5e5, head_dim=32)
    written = write_gguf(tmp_path / "tiny.gguf", model)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "hf")
    ours = open_checkpoint(written).model
    theirs = open_checkpoint(tmp_path / "hf", "dummy").model
    for name in ours.__slots__:
        if name != "rms_norm_eps":
            assert getattr(ours, name) == getattr(theirs, name)
    assert ours.rms_norm_eps == pytest.approx(2e-5, rel=1e-6)  # stored in float32


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), rope_factors=factors)
    plain = open_checkpoint(write_gguf(tmp_path / "plain.gguf", tiny_llama())).model.rope
    checkpoint = open_checkpoint(path)
    frequencies = checkpoint.model.rope.inv_freq()
    np.testing.assert_allclose(frequencies, plain.inv_freq() / factors, rtol=1e-6)
    checkpoint.load_weights(FakeWeights())  # the factors are no unexpected tensor
    write_gguf(path, tiny_llama(), rope_factors=factors[:5])
    with pytest.raises(ValueError, match="must be 8 positive numbers for head_dim 16, got 5"):
        open_checkpoint(path)


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(num_layers=3))
    file = GgufFile(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.2.attn_k.weight", b"blk.2.attn_z.weight"))
    with pytest.raises(ValueError) as raised:
        open_checkpoint(path).load_weights(FakeWeights())
    assert "missing tensors: model.layers.2.self_attn.k_proj.weight;" in str(raised.value)
    assert "unexpected tensors: blk.2.attn_z.weight" in str(raised.value)
    assert "model.layers.2.self_attn.k_proj.weight" in file.tensors()


def config_of(**changes: Any) -> dict[str, Any]:
    metadata = {k.replace("__", "."): v for k, v in changes.items()}
    merged = {k: v for k, v in (METADATA | metadata).items() if v is not None}
    return hf_config(merged, has_output=True, rope_factors=None)


def test_gemma3_fills_in_what_its_files_leave_out() -> None:
    gemma = {key.replace("llama.", "gemma3."): value for key, value in METADATA.items()}
    gemma |= {"general.architecture": "gemma3", "gemma3.attention.key_length": 32}
    gemma["gemma3.attention.sliding_window"] = 512
    config = hf_config(gemma, has_output=False, rope_factors=None)
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["query_pre_attn_scalar"] == 32 and config["sliding_window"] == 512
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    gemma |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    scaled = hf_config(gemma, has_output=False, rope_factors=None)
    assert scaled["rope_parameters"]["full_attention"]["factor"] == 8.0
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported for gemma3"):
        hf_config(gemma | {"gemma3.rope.scaling.type": "yarn"}, has_output=0, rope_factors=None)
    del gemma["gemma3.attention.sliding_window"]
    with pytest.raises(ValueError, match=r"lack gemma3\.attention\.sliding_window"):
        hf_config(gemma, has_output=False, rope_factors=None)


def test_metadata_may_leave_out_what_follows_from_the_rest() -> None:
    config = config_of()
    assert config["vocab_size"] == 3
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config_of(llama__attention__key_length=32)["head_dim"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"general.architecture": None}, "architecture None is not supported"),
        ({"llama.block_count": None}, "lack llama.block_count"),
        ({"llama.context_length": None}, "lack llama.context_length"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5 is not supported"),
        ({"llama.attention.head_count_kv": [4, 2]}, "differ from layer to layer"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "different width"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "factor 4.0"),
        ({"llama.rope.scale_linear": 2.0}, "factor 2.0 is not supported"),
        ({"split.count": 3}, "split over 3 files"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_token_ids_gather_every_end() -> None:
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 2, "padding": 0}
    metadata = {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    assert token_ids(metadata) == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert token_ids({}) == {}


# ---- broken files ----


def load_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.load_weights(FakeWeights())


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(num_layers=1))
    content = path.read_bytes()
    for size in [*range(40), *np.linspace(40, len(content) - 1, 80).astype(int)]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"tiny\.gguf"):
            load_all(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*none\.gguf"):
        GgufFile(tmp_path / "none.gguf")


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """Flipped bytes of header and metadata end in ValueError, or in a model; never in a hang."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(num_layers=1))
    content = path.read_bytes()
    head = GgufFile(path).tensors()["model.embed_tokens.weight"].stored.data_offset
    choices = random.Random(0)
    failures = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(choices.choice((1, 1, 2, 8))):
            damaged[choices.randrange(head)] = choices.choice((0, 1, 0xFF, choices.randrange(256)))
        path.write_bytes(damaged)
        try:
            load_all(path)
        except ValueError as error:
            assert "tiny.gguf" in str(error)
            failures += 1
    assert failures > 100


def test_a_kind_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    tensor = GgufFile(path).tensors()["model.layers.0.mlp.up_proj.weight"]
    odd = tensor.stored._replace(tensor_type=gguf.GGMLQuantizationType.Q8_1)
    with pytest.raises(ValueError, match=r"up_proj\.weight is stored as F32, which"):
        tensor.__class__(tensor.name, tensor.shape, "F32", path, odd, 0, tensor.mapping)._decode(
            odd.data
        )


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_threads_dequantise_what_one_would(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((4099, 1024), np.float32)
    quantisation = gguf.GGMLQuantizationType[kind]
    rows = gguf.quants.quantize(values, quantisation)
    assert rows.nbytes > 2 << 20  # two threads and more
    np.testing.assert_array_equal(
        dequantize(rows, quantisation), gguf.quants.dequantize(rows, quantisation)
    )


def test_a_directory_with_one_gguf_file_is_enough(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama())
    assert open_checkpoint(tmp_path).load_format == "gguf"
    assert open_checkpoint(tmp_path, "dummy").load_format == "dummy"
    write_gguf(tmp_path / "b.gguf", tiny_llama())
    with pytest.raises(FileNotFoundError, match=r"holds 2 \.gguf files"):
        open_checkpoint(tmp_path)
