"""The benchmark commands on a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanoflow.arguments import ArgumentParser
from nanoflow.bench import environment
from nanoflow.bench.command import add_bench_arguments
from nanoflow.bench.datasets import Request
from nanoflow.bench.first_run import QUESTIONS
from nanoflow.bench.steady import SteadyState
from nanoflow.bench.throughput import Measurement, lines, measure, to_json
from nanoflow.cli import run_command
from nanoflow.outputs import CompletionOutput, RequestOutput
from nanoflow.sampling_params import SamplingParams
from nanoflow.schedule import BUILT_IN


@dataclass
class Stats:
    time_done: float
    prefill_tokens: int
    output_tokens: int
    running: int
    waiting: int


class FakeLLM:
    """Generates what it is asked for, or one token less, and reports three steps."""

    def __init__(self, missing: int = 0) -> None:
        self.step_listener: Any = None
        self.missing = missing
        self.params: list[SamplingParams] = []

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, order: str) -> Any:
        self.params = sampling_params
        for step in (Stats(1, 4, 0, 1, 2), Stats(2, 4, 1, 1, 1), Stats(5, 4, 2, 0, 1)):
            self.step_listener(step)
        return [
            RequestOutput(
                request_id=str(index),
                prompt=None,
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    CompletionOutput(
                        0, "", [7] * ((one.max_tokens or 0) - self.missing), finish_reason="length"
                    )
                ],
                finished=True,
            )
            for index, (prompt, one) in enumerate(zip(prompts, sampling_params, strict=True))
        ]


REQUESTS = [Request([5, 6, 7, 8], 3), Request([5, 6], 5)]


def run(llm: FakeLLM, **options: Any) -> Measurement:
    how = {"temperature": 1.0, "detokenize": True, "seed": 3, "use_tqdm": False}
    return measure(llm, REQUESTS, **(how | options))


def test_measures_requests_and_steps():
    llm = FakeLLM()
    result = run(llm, temperature=0.5, detokenize=False)
    assert (result.num_requests, result.input_tokens, result.output_tokens) == (2, 6, 8)
    assert result.steps == 3
    assert result.steady == SteadyState(3, 1, 4, 2, mean_input=3, mean_output=4)
    assert result.seconds > 0
    assert llm.step_listener is None
    assert [params.max_tokens for params in llm.params] == [3, 5]
    assert [params.seed for params in llm.params] == [3, 4]
    assert all(params.ignore_eos and not params.detokenize for params in llm.params)
    assert {params.temperature for params in llm.params} == {0.5}


def test_a_request_that_ends_early_spoils_the_measurement():
    with pytest.raises(RuntimeError, match="request 0 generated 2 tokens instead of 3"):
        run(FakeLLM(missing=1))


MEASURED = Measurement(0.0, 4.0, 10, 1000, 600, 20, None)


def test_prints_the_lines_that_scripts_parse():
    assert lines(MEASURED)[:3] == [
        "Throughput: 2.50 requests/s, 400.00 total tokens/s, 150.00 output tokens/s",
        "Total num prompt tokens:  1000",
        "Total num output tokens:  600",
    ]


def test_json_has_the_fields_of_both_benchmarks():
    result = to_json(MEASURED)
    assert result["elapsed_time"] == 4.0
    assert result["num_requests"] == 10
    assert result["total_num_tokens"] == 1600
    assert result["requests_per_second"] == result["request_throughput"] == 2.5
    assert result["input_throughput"] == 250
    assert result["output_throughput"] == 150
    for name in ("tokens_per_second", "total_throughput", "total_token_throughput", "total_tok_s"):
        assert result[name] == 400
    assert result["output_tok_s"] == 150
    assert result["step_ms"] == 200
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (1000, 600)
    assert (result["mean_input_len"], result["mean_output_len"]) == (100, 60)
    assert result["steady_total_tok_s"] is None


def bench(*arguments: str | Path) -> int:
    parser = ArgumentParser(prog="bench")
    add_bench_arguments(parser)
    return run_command(parser, [str(argument) for argument in arguments])


RANDOM = ("--random-input-len", "9", "--random_output_len=6", "--random-range-ratio", "0.5")


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_throughput_command_writes_its_result(model, tmp_path, capsys, schedule):
    path = tmp_path / "result.json"
    flags = ("--num-prompts", "12", "--max-num-seqs", "4", "--num-warmups", "2", "--seed", "5")
    common = (*RANDOM, *flags, "--schedule", schedule)
    assert bench("throughput", "--model", model, *common, "--output-json", path) == 0
    printed = capsys.readouterr().out
    pattern = r"^Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s$"
    assert re.search(pattern, printed, re.MULTILINE)
    result = json.loads(path.read_text())
    assert f"Total num prompt tokens:  {result['total_input_tokens']}\n" in printed
    assert f"Total num output tokens:  {result['total_output_tokens']}\n" in printed
    assert (result["num_requests"], result["seed"], result["schedule"]) == (12, 5, schedule)
    assert result["model"] == result["model_id"] == model.name
    assert result["workload"] == "9x6-r0.5"
    assert result["measured"] == "whole run"
    assert result["commit"]
    assert [result[name] for name in ("gpu", "watts", "sm_mhz", "j_per_token")] == [None] * 4
    assert result["telemetry_reason"] == "only GPUs are sampled"
    assert 4 <= result["mean_input_len"] <= 14
    assert 3 <= result["mean_output_len"] <= 9
    assert set(result["phase_seconds"]) == {"load", "warm_up", "run"}
    assert result["warm_up"] == "2 requests of the same kind, not counted"
    assert result["steady_total_tok_s"] > 0
    assert result["versions"]["python"]
    assert "cpu" in result["device"]


def test_steady_start_measures_a_window_and_ends(model, tmp_path, capsys):
    flags = ("--max-num-seqs", "8", "--steady-seconds", "0.3", "--commit", "abc")
    flags += ("--device", "cpu", "--num-prompts", "20000", "--result-dir", tmp_path)
    lengths = ("--input-len", "20", "--output-len", "40")
    assert bench("throughput", "--model", model, *lengths, *flags, "--steady-start") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Steady state: [\d.]+ total tokens/s in 0\.\d+ s, ", printed, re.MULTILINE)
    result = json.loads((tmp_path / "cpu" / f"{model.name}-20x40-auto.json").read_text())
    steady = result["steady_state"]
    assert result["measured"] == "steady state"
    assert steady["seconds"] >= 0.3
    assert steady["fill_requests"] == 8
    assert 7 < steady["mean_running"] <= 8
    assert steady["prompt_per_output_in_the_long_run"] == 0.5
    begun = steady["prompt_tokens"] / 20
    assert abs(begun * 40 - steady["output_tokens"]) <= 8 * 40  # each slot is within one request
    assert result["output_tok_s"] == steady["output_tokens"] / steady["seconds"]
    assert result["steady_total_tok_s"] == min(steady["counted_tok_s"], steady["from_output_tok_s"])
    assert result["step_ms"] == pytest.approx(1e3 * steady["seconds"] / steady["steps"])
    assert result["commit"] == "abc"
    assert result["profile"] is result["gemm_ceiling_tflops"] is None
    assert result["profile_reason"] == "only GPUs are profiled"
    assert set(result["phase_seconds"]) == {"load", "fill", "window"}


def test_several_outputs_of_each_prompt_are_counted(model, tmp_path):
    path = tmp_path / "result.json"
    flags = ("--input-len", "7", "--output-len", "4", "--num-prompts", "5", "--n", "3")
    assert bench("throughput", "--model", model, *flags, "--output-json", path) == 0
    result = json.loads(path.read_text())
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (35, 60)
    assert result["n"] == 3


def test_a_stream_that_ends_too_early_is_told(model, capsys):
    flags = ("--max-num-seqs", "4", "--num-prompts", "6", "--input-len", "9", "--output-len", "9")
    assert bench("throughput", "--model", model, *flags, "--steady-start") == 1
    assert "raise --num-prompts" in capsys.readouterr().err


def test_throughput_of_a_trace(model, tmp_path, capsys):
    trace, path = tmp_path / "trace.csv", tmp_path / "result.json"
    trace.write_text("prompt_tokens,output_tokens\n5,3\n9,4\n9999,4\n")
    dataset = ("--dataset-name", "trace", "--dataset-path", trace, "--num-prompts", "4")
    flags = ("--temperature", "0", "--disable-detokenize", "--output-json", path)
    assert bench("throughput", "--model", model, *dataset, *flags) == 0
    result = json.loads(path.read_text())
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (28, 14)
    assert result["warm_up"] == "none; loading is not counted"
    assert "Steady state: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset-name", "trace"), "--dataset-name trace needs --dataset-path FILE"),
        (("--dataset-path", "x.csv"), "--dataset-path is for --dataset-name trace"),
        (
            ("--dataset-name", "trace", "--dataset-path", "x.csv", "--random-range-ratio", "0"),
            "--random-range-ratio is for --dataset-name random",
        ),
        (
            ("--input-len", "5", "--random-input-len", "5"),
            "--input-len and --random-input-len are the same",
        ),
        (("--num-prompts", "0"), "--num-prompts 0 must be at least 1"),
        (("--n", "0"), "--n 0 must be at least 1"),
        (("--steady-start", "--steady-seconds", "0"), "--steady-seconds 0.0 must be above 0"),
        (("--n", "2", "--steady-start"), "--n 2 must be at least 1, and is 1 with --steady-start"),
        (("--input-len", "200", "--output-len", "57"), "up to 257 tokens exceed max_model_len 256"),
        (("--input-len", "0"), "lengths are 0 in, 128 out"),
        (("--schedule", "best"), "schedule 'best' is unknown"),
        (("--dataset-name", "trace", "--dataset-path", "none.csv"), "No such file"),
    ],
)
def test_flags_that_do_not_fit_are_told_in_one_line(model, capsys, flags, message):
    assert bench("throughput", "--model", model, *flags) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("bench: error: ")
    assert message in told


@pytest.mark.parametrize(
    "arguments",
    [
        ("soak",),
        ("throughput", "--dataset-name", "burstgpt"),
        ("throughput", "--num-prompt", "5"),
        ("throughput", "--lora-path", "x"),
    ],
)
def test_unknown_commands_and_flags_are_argparse_errors(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        bench(*arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_first_run_answers_and_compares_the_schedules(model, capsys):
    assert bench("--model", model) == 0
    printed = capsys.readouterr().out
    assert [question for question in QUESTIONS if f"> {question}\n" in printed] == [*QUESTIONS]
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +([\d.]+)  \w", printed, re.MULTILINE)
    assert [row[0] for row in rows] == [*BUILT_IN]
    for _, total, output, _ in rows:
        assert int(total) == pytest.approx(3 * int(output), rel=0.05)


@pytest.mark.parametrize(
    ("original", "argv", "command"),
    [
        (
            ["/usr/bin/python3", "-m", "nanoflow.bench", "throughput"],
            ["/site/nanoflow/bench/__main__.py", "throughput"],
            "python -m nanoflow.bench throughput",
        ),
        (["python", "/venv/bin/nanoflow", "bench", "a b"], ["/venv/bin/nanoflow", "bench", "a b"],
         "nanoflow bench 'a b'"),
        (["python", "bench/x.py", "--to=/a/b", "/c/d", "e/f"],
         ["bench/x.py", "--to=/a/b", "/c/d", "e/f"], "python bench/x.py --to=b d e/f"),
        (["python", "-m", "pytest", "-q"], ["bench/x.py", "a", "b"], "python bench/x.py a b"),
        (["python", "-m", "pytest", "-q"], ["bench/x.py", "a"], "python bench/x.py a"),
    ],
)  # fmt: skip
def test_command_line_is_what_a_user_types(monkeypatch, original, argv, command):
    monkeypatch.setattr("sys.orig_argv", original)
    monkeypatch.setattr("sys.argv", argv)
    assert environment.command_line() == command
