"""From a path to filled weights: fusing, dummy weights, dtypes, and models that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fake_weights import FakeWeights, read
from nanoflow.loading import open_checkpoint
from nanoflow.loading.loader import load_weights
from nanoflow.models import CheckpointWeight, WeightTarget
from tiny_models import tiny_llama, write_tiny_llama

# ---- filling weights ----


def expected_weights(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """What csrc/model/weights.h says the engine's tensors hold."""
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        weights["lm_head"] = state["lm_head.weight"]
    for n in range(num_layers):
        layer = {k: v for k, v in state.items() if k.startswith(f"model.layers.{n}.")}

        def of(*names: str, layer: dict[str, torch.Tensor] = layer, n: int = n) -> torch.Tensor:
            return torch.cat([layer[f"model.layers.{n}.{name}"] for name in names])

        q, k, v = (f"self_attn.{part}_proj" for part in "qkv")
        weights |= {
            f"layers.{n}.input_norm": of("input_layernorm.weight"),
            f"layers.{n}.qkv": of(f"{q}.weight", f"{k}.weight", f"{v}.weight"),
            f"layers.{n}.o": of("self_attn.o_proj.weight"),
            f"layers.{n}.post_norm": of("post_attention_layernorm.weight"),
            f"layers.{n}.gate": of("mlp.gate_proj.weight"),
            f"layers.{n}.up": of("mlp.up_proj.weight"),
            f"layers.{n}.down": of("mlp.down_proj.weight"),
        }
        if f"model.layers.{n}.{q}.bias" in layer:
            weights[f"layers.{n}.qkv_bias"] = of(f"{q}.bias", f"{k}.bias", f"{v}.bias")
        if f"model.layers.{n}.self_attn.q_norm.weight" in layer:
            weights[f"layers.{n}.q_norm"] = of("self_attn.q_norm.weight")
            weights[f"layers.{n}.k_norm"] = of("self_attn.k_norm.weight")
    return weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "tied, family", [(False, "Llama"), (True, "Llama"), (False, "Qwen2"), (False, "Qwen3")]
)
def test_weights_are_fused_by_rows(tmp_path: Path, dtype: str, tied: bool, family: str) -> None:
    model = {"dtype": dtype, "tie_word_embeddings": tied, "head_dim": 24, "family": family}
    write_tiny_llama(tmp_path, **model)
    state = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in state) != tied
    weights = FakeWeights()
    open_checkpoint(tmp_path).load_weights(weights)
    assert weights.is_finished
    expected = expected_weights(state, num_layers=2)
    assert weights.parts.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights.tensor(name), tensor.float().numpy())


def test_one_error_names_everything_that_does_not_fit(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"], state["model.layers.1.self_attn.k_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    state["lm_head.weight"] = torch.zeros(160, 32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # known, not read
    save_file(state, path)
    weights = FakeWeights()
    with pytest.raises(ValueError) as raised:
        open_checkpoint(tmp_path).load_weights(weights)
    assert str(raised.value) == (
        f"{tmp_path} does not fit its config; "
        "missing tensors: model.layers.1.self_attn.k_proj.weight, model.norm.weight; "
        "unexpected tensors: model.layers.0.self_attn.q_proj.bias; "
        "misshapen tensors: lm_head.weight [160, 32] instead of [160, 64]"
    )
    assert not weights.parts


def test_a_head_beside_tied_embeddings_is_not_read(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = FakeWeights()
    open_checkpoint(tmp_path).load_weights(weights)
    assert "lm_head" not in weights.parts


@dataclass(frozen=True)
class CountedTensor:
    """A tensor whose rows say where they are, handed out a few at a time."""

    name: str
    shape: tuple[int, int]
    dtype: str = "F32"

    def chunks(self, max_bytes: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        rows = np.arange(self.shape[0] * self.shape[1], dtype=np.float32).reshape(self.shape)
        for begin in range(0, self.shape[0], 4):
            yield begin, rows[begin : begin + 4]


def test_rows_of_one_tensor_may_fill_several_targets() -> None:
    fused = CountedTensor("fused", (10, 3))
    targets = (WeightTarget("a", 5, 3), WeightTarget("b", 0, 7))
    weights = FakeWeights()
    load_weights(
        weights,
        {"fused": fused},
        {"fused": CheckpointWeight(fused.shape, targets)},
        lambda name: False,
        "test",
    )
    rows = read(fused)
    assert [begin for begin, _ in weights.parts["a"]] == [5]
    np.testing.assert_array_equal(weights.parts["a"][0][1], rows[:3])
    np.testing.assert_array_equal(weights.tensor("b"), rows[3:])


# ---- dummy weights ----


def test_dummy_weights_need_a_config_only_and_depend_on_the_seed(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    def fill(seed: int) -> dict[str, tuple[int, float, float]]:
        weights = FakeWeights({"norm": (64,), "layers.0.o": (64, 64), "layers.1.o": (64, 64)})
        open_checkpoint(tmp_path, "dummy", seed=seed).load_weights(weights)
        assert weights.is_finished
        return weights.filled

    first, again, other = fill(0), fill(0), fill(1)
    assert first == again
    assert {name: fill[1:] for name, fill in first.items()} == {
        "norm": (1.0, 0.1),
        "layers.0.o": (0.0, 0.02),
        "layers.1.o": (0.0, 0.02),
    }
    seeds = [fill[0] for fill in (*first.values(), *other.values())]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 1 << 64 for seed in (*seeds, fill(-1)["norm"][0]))


# ---- opening a checkpoint ----


def test_dtype_rule(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        checkpoint = open_checkpoint(write_tiny_llama(tmp_path / dtype, dtype=dtype))
        assert checkpoint.resolve_dtype() == dtype
        assert checkpoint.resolve_dtype("half") == "float16"
        assert checkpoint.resolve_dtype("float") == "float32"
        path = tmp_path / dtype / "config.json"
        config = json.loads(path.read_text())
        del config["dtype"]
        path.write_text(json.dumps(config))
        assert open_checkpoint(tmp_path / dtype).resolve_dtype("auto") == dtype
        path.write_text(json.dumps(config | {"torch_dtype": "float16"}))
        assert open_checkpoint(tmp_path / dtype).resolve_dtype() == "float16"
        with pytest.raises(ValueError, match="dtype 'float8' is not supported"):
            checkpoint.resolve_dtype("float8")


def test_generation_config_is_read_when_there_is_one(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    assert open_checkpoint(tmp_path).generation_config["eos_token_id"] == 2
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path).generation_config == {}


@pytest.mark.parametrize(
    ("model", "load_format", "error", "message"),
    [
        ("/nowhere/model", "auto", FileNotFoundError, "/nowhere/model does not exist"),
        ("nowhere.gguf", "auto", FileNotFoundError, "nowhere.gguf does not exist"),
        (Path("nowhere"), "auto", FileNotFoundError, "nowhere does not exist"),
        (".", "zip", ValueError, "load_format 'zip' is unknown; known: auto, safetensors"),
        (Path(__file__), "auto", ValueError, r"test_loading\.py is a file"),
    ],
)
def test_what_cannot_be_opened_is_named(
    model: str | Path, load_format: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(model, load_format)


def test_a_directory_without_or_with_a_broken_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds 0 \.gguf files"):
        open_checkpoint(tmp_path, "gguf")
    for content, message in (("{", "is not valid JSON"), ("[]", "is no JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)


def open_in_subprocess(model: str, hf_home: Path) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its settings when it is imported, so a new process."""
    code = f"from nanoflow.loading import open_checkpoint; print(open_checkpoint({model!r}).path)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_HOME": str(hf_home),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_repository_comes_from_the_local_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = write_tiny_llama(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    found = open_in_subprocess("someone/tiny", tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith(str(snapshot))


def test_a_repository_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    failed = open_in_subprocess("someone/unknown", tmp_path)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: model 'someone/unknown' is no local path")
    assert "pass the path of a local model" in last
