"""Several ranks give the tokens of one, whatever the family, the schedule and the delays."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_driver import Chunk, EngineDriver, load_engine
from mixtures import MIXTURES
from nanoflow import LLM, EngineError, SamplingParams, _core
from nanoflow.bench.result import result_path
from nanoflow.cli import main
from nanoflow.schedule import built_in_schedule, schedule_from_json, schedule_to_json
from random_models import write_config
from reference import decode, encode
from tiny_models import write_tiny_llama

LENGTHS = (5, 17, 1, 9, 30, 2, 12, 3)
DECODE_STEPS = 3

Logits = list[NDArray[np.float32]]


def sequential(**stages: _core.StageSpec) -> _core.Schedule:
    return _core.Schedule("sequential", [_core.LaneSpec("all", 1)], stages)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 100, length).tolist() for length in LENGTHS]


def run(engine: _core.Engine) -> tuple[list[list[int]], Logits]:
    """Prefills all prompts in one step, then decodes; requests are dealt to segments in turn."""
    driver = EngineDriver(engine)
    sequences = [driver.add(tokens) for tokens in prompts()]
    segments = len(engine.schedule.cuts()) + 1
    logits: Logits = []
    for _ in range(1 + DECODE_STEPS):
        step: list[list[Chunk]] = [[] for _ in range(segments)]
        for i, s in enumerate(sequences):
            step[i * segments // len(sequences)].append(Chunk(s, len(s.tokens) - s.computed))
        result = driver.step(step)
        assert result.logits is not None
        logits.append(result.logits)
    return [s.tokens for s in sequences], logits


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"family": "Mistral", "sliding_window": 7},
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", "head_dim": 32},
    "gemma3": {
        "family": "Gemma3",
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "initializer_range": 0.12,
    },
    "mixtral": MIXTURES["mixtral"],
    "qwen3-moe": MIXTURES["qwen3-moe-d64"] | {"moe_intermediate_size": 64},
    "qwen3-moe-raw": MIXTURES["qwen3-moe-raw"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_what_one_gives(family: str, tmp_path: Path) -> None:
    """Two KV heads: of four ranks, two hold the same one. The vocabulary does not divide by 32."""
    write_tiny_llama(tmp_path, **{"num_layers": 3, "vocab_size": 150, **FAMILIES[family]})
    tokens, logits = run(load_engine(tmp_path, sequential()))
    gathering = sequential(o=_core.StageSpec([0.5], gather=[0]))
    for ranks in (2, 4):
        for schedule in (sequential(), gathering):
            engine = load_engine(tmp_path, schedule, ranks=ranks)
            own_tokens, own_logits = run(engine)
            assert own_tokens == tokens
            for got, expected in zip(own_logits, logits, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def paper_shapes(width: int) -> _core.Schedule:
    return built_in_schedule("tp-overlap", width)


def reduced(width: int) -> _core.Schedule:
    """Collectives beside products, and nothing gathered before o."""
    lanes = [_core.LaneSpec("compute", max(1, width - 1)), _core.LaneSpec("network", 1)]
    halves = _core.StageSpec([0.5], "compute", "network")
    return _core.Schedule(
        "reduced", lanes, {"o": halves, "mlp": halves}, ["qkv.0", "o.0", "o.1", "mlp.0", "mlp.1"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overlapped", [paper_shapes, reduced])
@pytest.mark.parametrize(("family", "ranks"), [("llama", 2), ("llama", 4), ("mixtral", 2)])
def test_overlap_and_delays_change_no_bit(
    family: str, overlapped: Any, ranks: int, dtype: str, tmp_path: Path
) -> None:
    """Against ranks that do one thing after the other, with the same parts gathered."""
    write_tiny_llama(tmp_path, num_layers=3, **FAMILIES[family])
    schedule = overlapped(4)
    plain = sequential(
        qkv=_core.StageSpec(schedule.cuts()),
        o=_core.StageSpec([0.5], gather=schedule.stages["o"].gather),
    )
    tokens, logits = run(load_engine(tmp_path, plain, ranks=ranks, dtype=dtype))
    for jitter_us in (0, 60):
        engine = load_engine(
            tmp_path, schedule, ranks=ranks, dtype=dtype, jitter_us=jitter_us, threads=4 * ranks
        )
        own_tokens, own_logits = run(engine)
        assert own_tokens == tokens
        for got, expected in zip(own_logits, logits, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_papers_two_shapes_are_planned_on_the_network_lane(family: str, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, **FAMILIES[family])
    schedule = schedule_from_json(schedule_to_json(paper_shapes(8)))
    assert schedule == paper_shapes(8)
    engine = load_engine(tmp_path, schedule, ranks=2, threads=16)
    layers, head = engine.plans([8, 8, 8, 8], 4)
    assert layers.validate(8) == head.validate(8) == []
    lines = [line.split() for line in repr(layers).splitlines()[2:]]
    lane_of = {" ".join(line[2:4]): line[1] for line in lines}
    gathered = [line[2] for line in lines if line[3] == "all_gather"]
    reduced = [line[2] for line in lines if line[3] == "all_reduce"]
    assert gathered == [f"layers.{layer}.o.0" for layer in (0, 0, 1, 1)]
    assert sorted(reduced) == sorted(
        f"layers.{layer}.{part}" for layer in (0, 1) for part in ("o.1", "mlp.0", "mlp.1")
    )
    normed = {line[2] for line in lines if line[3] == "rms_norm"}  # all else by all-reduces
    assert normed == {f"layers.0.qkv.{part}" for part in range(4)} | {
        f"layers.{layer}.o.0" for layer in (0, 1)
    }
    for name, lane in lane_of.items():
        assert (lane == "network") == (name.split()[1] in ("all_gather", "all_reduce"))
    assert " whole " in next(line for line in repr(head).splitlines() if "all_gather" in line)


def test_one_rank_has_no_collectives(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    engine = load_engine(tmp_path, paper_shapes(4))
    plans = "".join(repr(plan) for plan in engine.plans([8, 8, 8, 8], 4))
    assert "all_" not in plans
    tokens, _ = run(engine)
    assert tokens == run(load_engine(tmp_path, sequential()))[0]


OPTIONS: list[dict[str, Any]] = [  # of the prompts: every path of the head
    {"temperature": 0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {5: 4.0, 149: 4.0}},
    {"allowed_token_ids": [*range(0, 160, 3)]},
    {"temperature": 0, "prompt_logprobs": 2},
    {"n": 2, "min_tokens": 6, "stop_token_ids": [*range(40)]},
]


def generate(model: Path, **arguments: Any) -> tuple[list[list[int]], list[float]]:
    """Tokens of all samples; and log-probabilities of all of them, and of those of prompts."""
    params = [
        SamplingParams(
            **{"temperature": 0.8, "seed": n, "max_tokens": 12, "logprobs": 2, **options},
            detokenize=False,
        )
        for n, options in enumerate(OPTIONS)
    ]
    with LLM(
        model, device="cpu", cpu_threads=4, skip_tokenizer_init=True, block_size=16, **arguments
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
    tokens, logprobs = [], []
    for output in outputs:
        scores = [*(output.prompt_logprobs or [])]
        ids = [*output.prompt_token_ids] if scores else []
        for completion in output.outputs:
            assert completion.logprobs is not None
            tokens.append(list(completion.token_ids))
            scores += completion.logprobs
            ids += completion.token_ids
        pairs = zip(ids, scores, strict=True)
        logprobs += [entry[token].logprob for token, entry in pairs if entry is not None]
    return tokens, logprobs


@pytest.mark.parametrize(
    ("family", "schedule", "load_format"),
    [
        ("llama", "sequential", "auto"),
        ("llama", "overlap", "dummy"),
        ("llama", "tp-overlap", "auto"),
        ("mixtral", "tp-overlap", "dummy"),
        ("qwen3-moe", "sequential", "auto"),
    ],
)
def test_an_llm_of_ranks_samples_what_one_samples(
    family: str, schedule: str, load_format: str, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path, **FAMILIES[family])
    arguments = {"dtype": "float32", "schedule": schedule, "load_format": load_format}
    expected, scores = generate(tmp_path, **arguments)
    assert len(expected) == 9 and len(set(map(tuple, expected))) > 5
    for ranks in (2, 4):
        found, own_scores = generate(tmp_path, tensor_parallel_size=ranks, **arguments)
        assert found == expected
        np.testing.assert_allclose(own_scores, scores, rtol=1e-3, atol=1e-3)


def test_memory_is_that_of_all_ranks(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    sizes = {"device": "cpu", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 20}
    with LLM(tmp_path, **sizes) as one, LLM(tmp_path, tensor_parallel_size=2, **sizes) as two:
        assert two.limits.num_pages == one.limits.num_pages
        assert two.memory.kv_cache == one.memory.kv_cache
        whole = one.memory.weights
        assert whole < two.memory.weights < 2 * whole  # embeddings are on both


def test_pages_are_offloaded_by_one_rank_only(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="kv_offloading_size=1 needs tensor_parallel_size=1, not 2"
    ):
        LLM(tmp_path, tensor_parallel_size=2, kv_offloading_size=1)


def test_a_model_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(EngineError, match="tensor_parallel_size 3 does not divide num_heads 4"):
        LLM(
            tmp_path,
            device="cpu",
            load_format="dummy",
            skip_tokenizer_init=True,
            tensor_parallel_size=3,
        )


@pytest.mark.parametrize("schedule", ["sequential", "tp-overlap"])
def test_one_rank_is_measured_without_the_others(schedule: str, tmp_path: Path) -> None:
    """As many tokens as with all of them, and a fourth of what they all hold."""
    write_tiny_llama(tmp_path)
    sizes = {"schedule": schedule, "kv_cache_memory_bytes": 1 << 20, "max_model_len": 64}
    params = SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": [3, 1, 4]}
    memory = []
    for ranks in ({"tensor_parallel_size": 4}, {"simulated_tensor_parallel_size": 4}):
        with LLM(tmp_path, device="cpu", skip_tokenizer_init=True, **ranks, **sizes) as llm:
            outputs = llm.generate([prompt] * 5, params, use_tqdm=False)
            memory.append(llm.memory)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [9] * 5
    assert memory[0].weights == 4 * memory[1].weights
    assert memory[1].num_pages == 4 * memory[0].num_pages
    with pytest.raises(ValueError, match="is for one rank of them, not for tensor_parallel_size=2"):
        LLM(tmp_path, simulated_tensor_parallel_size=4, tensor_parallel_size=2)


def collect(op: str, backends: list[_core.Backend], operands: list[dict[str, Any]]) -> None:
    """Runs a collective on all ranks at once."""
    with ThreadPoolExecutor(len(backends)) as pool:
        runs = [
            pool.submit(_core.run_op, op, backend, **own)
            for backend, own in zip(backends, operands, strict=True)
        ]
        for one in runs:
            one.result()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_all_reduce_sums_in_order_and_rounds_once(ranks: int, dtype: str) -> None:
    rng = np.random.default_rng(5)
    values = [encode(rng.standard_normal((7, 33), np.float32), dtype) for _ in range(ranks)]
    expected = np.zeros((7, 33), np.float32)
    for value in values:
        expected += decode(value).astype(np.float32)
    collect("all_reduce", _core.make_backends("cpu", ranks, 4), [{"x": x} for x in values])
    for value in values:
        np.testing.assert_array_equal(value, encode(expected, dtype))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_an_all_reduce_norms_as_the_norm_after_it_would(
    ranks: int, rows: int, unit_offset: bool, dtype: str
) -> None:
    """Bit for bit, whoever sums a row; both where the ranks have it."""
    rng = np.random.default_rng(7)
    values = [encode(rng.standard_normal((rows, 33), np.float32), dtype) for _ in range(ranks)]
    weight = encode(rng.standard_normal(33, np.float32), dtype)
    backends = _core.make_backends("cpu", ranks, 4)
    plain = [value.copy() for value in values]
    collect("all_reduce", backends, [{"x": x} for x in plain])
    expected = np.zeros_like(plain[0])
    style = {"weight": weight, "eps": 1e-5, "unit_offset": unit_offset}
    _core.run_op("rms_norm", backends[0], x=plain[0], out=expected, **style)
    normed = [np.zeros_like(value) for value in values]
    style = {"norm_weight": weight, "norm_eps": 1e-5, "norm_unit_offset": unit_offset}
    operands = [{"x": x, "normed": out, **style} for x, out in zip(values, normed, strict=True)]
    collect("all_reduce", backends, operands)
    for rank in range(ranks):
        np.testing.assert_array_equal(values[rank], plain[0])
        np.testing.assert_array_equal(normed[rank], expected)
        assert decode(normed[rank]).astype(np.float32).std() > 0.5


def test_only_a_backend_that_norms_sums_is_asked_to() -> None:
    x = np.ones((2, 32), np.float32)
    (backend,) = _core.make_backends("cpu", 1, 2, simulated_ranks=2)
    with pytest.raises(_core.EngineError, match="norms no sums; run rms_norm after it"):
        _core.run_op("all_reduce", backend, x=x, normed=x.copy(), norm_weight=x[0], norm_eps=1e-5)


def test_a_sum_is_not_normed_in_place() -> None:
    x = np.ones((2, 32), np.float32)
    (backend,) = _core.make_backends("cpu", 1, 2)
    weight = np.ones(32, np.float32)
    with pytest.raises(_core.EngineError, match="a norm of what it sums needs an out of its own"):
        _core.run_op("all_reduce", backend, x=x, normed=x, norm_weight=weight, norm_eps=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 5])
def test_an_all_gather_puts_columns_side_by_side(ranks: int, spare: int) -> None:
    """In place, too, and without the columns for which there is no room."""
    rng = np.random.default_rng(6)
    columns = 8
    parts = [rng.standard_normal((9, columns), np.float32) for _ in range(ranks)]
    expected = np.concatenate(parts, axis=1)[:, : ranks * columns - spare]
    backends = _core.make_backends("cpu", ranks, 4)
    outs = [np.zeros_like(expected) for _ in range(ranks)]
    operands = [{"x": x, "out": out} for x, out in zip(parts, outs, strict=True)]
    collect("all_gather", backends, operands)
    for out in outs:
        np.testing.assert_array_equal(out, expected)
    if spare:
        return
    outs = [np.zeros_like(expected) for _ in range(ranks)]
    own = [out[:, r * columns : (r + 1) * columns] for r, out in enumerate(outs)]
    for view, part in zip(own, parts, strict=True):
        view[:] = part
    operands = [{"x": x, "out": out} for x, out in zip(own, outs, strict=True)]
    collect("all_gather", backends, operands)
    for out in outs:
        np.testing.assert_array_equal(out, expected)


def test_a_result_says_that_ranks_were_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import tensor_parallel

    options = argparse.Namespace(
        ranks=None,
        simulate=4,
        shape="tiny",
        schedule="tp-overlap",
        max_num_seqs=4,
        max_num_batched_tokens=32,
        steady_seconds=0.2,
        device="cpu",
        output_dir=tmp_path,
        commit="abc",
    )
    arguments = tensor_parallel.command(options, "8x6")
    assert arguments[1:4] == ["-m", "nanoflow.bench", "throughput"]
    whole = [flag for flag in arguments[4:] if flag not in ("--ablate", "--steady-start")]
    assert main(["bench", "throughput", *whole, "--num-prompts", "5", "--cpu-threads", "3"]) == 0
    found = json.loads((tmp_path / "tiny-tp4-simulated-8x6-ablation.json").read_text())
    assert found["tensor_parallel_size"] == 4
    assert found["network"].startswith("none: one rank alone")
    assert found["total_tok_s_per_gpu"] * 4 == pytest.approx(found["total_tok_s"])
    assert result_path(Path("."), found) == Path("cpu/tiny-tp4-simulated-8x6-tp-overlap-whole.json")
