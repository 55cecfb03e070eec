"""The console command: engine flags, chat, plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.arguments import ArgumentParser, add_engine_arguments, engine_arguments
from nanoflow.chat import HELP, converse
from nanoflow.cli import main
from nanoflow.config import EngineArgs
from nanoflow.plan_view import Panel, bars_of_layer, draw_lanes, to_bar
from tiny_models import write_tiny_llama

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def parse(*arguments: str) -> dict[str, Any]:
    parser = ArgumentParser()
    add_engine_arguments(parser)
    return engine_arguments(parser.parse_args(arguments))


def test_flags_not_given_leave_the_defaults_to_the_engine():
    assert parse() == {}


def test_every_engine_argument_has_a_flag():
    parser = ArgumentParser()
    add_engine_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = {field.name for field in fields(EngineArgs)} - {"simulated_tensor_parallel_size"}
    assert {f"--{name.replace('_', '-')}" for name in names} <= flags


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        (["--max-num-seqs", "8"], {"max_num_seqs": 8}),
        (["--max_num_seqs", "8"], {"max_num_seqs": 8}),
        (["--max_num_seqs=8"], {"max_num_seqs": 8}),
        (["--model=my_model"], {"model": "my_model"}),
        (["--max-model-len", "32k"], {"max_model_len": "32k"}),
        (["--max-model-len", "4096"], {"max_model_len": 4096}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--no-enforce-eager"], {"enforce_eager": False}),
        (["--no-async-scheduling"], {"async_scheduling": False}),
        (["--no_enable_prefix_caching"], {"enable_prefix_caching": False}),
        (["-tp", "2"], {"tensor_parallel_size": 2}),
        (["--model-path", "m", "--context-length", "512"], {"model": "m", "max_model_len": 512}),
        (["--max-running-requests", "9"], {"max_num_seqs": 9}),
        (["--page-size", "16", "--tp-size", "1"], {"block_size": 16, "tensor_parallel_size": 1}),
        (["--disable-radix-cache"], {"enable_prefix_caching": False}),
        (["--disable-overlap-schedule"], {"async_scheduling": False}),
        (["--disable-cuda-graph"], {"enforce_eager": True}),
    ],
)
def test_flags_are_read_as_users_of_both_engines_write_them(arguments, parsed):
    assert parse(*arguments) == parsed


@pytest.mark.parametrize("arguments", [["--max-num-seq", "8"], ["--max-num-seqs", "x"]])
def test_wrong_flags_are_errors(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True, num_layers=3)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("nanoflow ")


def test_bench_is_there(model, capsys):
    flags = ["--num-prompts", "2", "--input-len", "4", "--output-len", "2"]
    assert main(["bench", "throughput", "--model", str(model), *flags]) == 0
    assert capsys.readouterr().out.startswith("Throughput: ")


def test_mistakes_are_told_in_one_line(capsys):
    assert main(["plan", "--model", "/no/such/model"]) == 1
    assert capsys.readouterr().err == (
        "nanoflow: error: model path /no/such/model does not exist\n"
    )


def talk(llm: Any, *lines: str, system_prompt: str | None = None) -> list[str]:
    """What a conversation writes; the input ends after the lines."""
    given: Iterator[str] = iter(lines)
    written: list[str] = []

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    params = SamplingParams(temperature=0, max_tokens=8)
    converse(llm, params, system_prompt, read, written.append)
    return written


class Parrot:
    """Stands for an LLM that repeats the conversation as it was given."""

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def chat(self, messages: Any, params: Any, use_tqdm: bool) -> Any:
        self.heard.append([dict(message) for message in messages])
        question = messages[-1]["content"]
        if question == "interrupt":
            raise KeyboardInterrupt
        if question == "too long":
            raise ValueError("the prompt has 999 tokens")

        @dataclass
        class Output:
            text: str
            finish_reason: str
            outputs: Any = None

        return [Output("", "", [Output(f" {question}! ", "stop")])]


def roles(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_chat_keeps_the_history():
    parrot = Parrot()
    assert talk(parrot, "one", "  ", "two", system_prompt="be brief") == ["one!", "two!"]
    assert roles(parrot.heard[-1]) == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "one!"),
        ("user", "two"),
    ]


def test_chat_forgets_and_ends():
    parrot = Parrot()
    written = talk(parrot, "one", "/clear", "two", "/what", "/exit", "three")
    assert written == ["one!", "two!", HELP]
    assert roles(parrot.heard[-1]) == [("user", "two")]


def test_chat_goes_on_after_an_answer_that_failed():
    parrot = Parrot()
    written = talk(parrot, "interrupt", "too long", "one")
    assert written == ["(stopped)", "the prompt has 999 tokens\n/clear starts anew", "one!"]
    assert roles(parrot.heard[-1]) == [("user", "one")]


def test_chat_with_a_model(model):
    with LLM(model) as llm:
        written = talk(llm, "hello")
        messages = [{"role": "user", "content": "hello"}]
        params = SamplingParams(temperature=0, max_tokens=8)
        expected = llm.chat(messages, params, use_tqdm=False)[0].outputs[0]
    assert written[0] == expected.text.strip()
    assert (len(written) == 2) == (expected.finish_reason == "length")


def test_chat_command(model, monkeypatch, capsys):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--model", str(model), "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith(HELP)


def test_plan_prints_the_ops_of_a_layer(model, capsys):
    assert main(["plan", "--model", str(model), "--rows", "8", "--schedule", "nano"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan of schedule 'nano'")
    assert "layers.1.mlp.1 gemm" in printed
    assert "layers.0." not in printed
    assert "finding" not in printed


def test_plan_draws_the_lanes_of_a_layer(model, tmp_path, capsys):
    png = tmp_path / "plan.png"
    flags = ["--rows", "6", "--context", "40", "--layer", "2", "--schedule", "overlap"]
    assert main(["plan", "--model", str(model), *flags, "--png", str(png)]) == 0
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert f"{png}: lanes over layer 2, measured" in capsys.readouterr().out


def test_plan_shows_what_was_tuned_beside_what_is_measured(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nanoflow.plan_command.SECONDS", 0.05)
    device = ["--model", str(model), "--device", "cpu", "--cpu-threads", "4"]
    grid = ["--rows", "8", "16", "--decodes", "4", "8", "--context", "32", "--widths", "1"]
    assert main(["tune", *device, *grid, "--seconds", "0.02", "--candidates", "2"]) == 0
    page, png = tmp_path / "plan.html", tmp_path / "plan.png"
    mix = ["--rows", "8", "--context", "32", "--prefill-rows", "8", "--schedule", "overlap"]
    assert main(["plan", *device, *mix, "--html", str(page), "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    assert f"{page}: lanes over layer 1, predicted and measured" in printed
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    text = page.read_text()
    for cell in ("compute</td><td>3</td><td>75%", "attn</td><td>memory</td><td>8 + 8", "tokens/s"):
        assert cell in text
    assert "o.0 mlp.0 qkv.0@+1 o.1 mlp.1 qkv.1@+1" in text
    assert text.count("<svg") == text.count("</svg>") == 1
    assert text.index("predicted: ") > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "3"], "--layer 3: the model has layers 0 to 2"),
        (["--rows", "0"], "--rows 0 and --prefill-rows 0 must not be below 0, and at least 1"),
        (["--context", "257"], "--context 257 must be from 1 to the model's 256 positions"),
    ],
)
def test_plan_rejects_what_the_model_does_not_have(model, capsys, flags, message):
    assert main(["plan", "--model", str(model), *flags]) == 1
    assert message in capsys.readouterr().err


@dataclass
class Timing:
    name: str
    lane: str
    begin_us: float
    end_us: float


TIMINGS = [
    Timing("layers.0.mlp.0 gemm", "compute", 0, 4),
    Timing("layers.0.attn.1 attention", "memory", 0, 6),
    Timing("layers.1.qkv.0 gemm", "compute", 5, 10),
    Timing("layers.1.attn.0 attention", "memory", 10, 20),
    Timing("layers.2.qkv.0 gemm", "compute", 19, 22),
    Timing("head sample", "compute", 30, 31),
]


def test_labels_are_read():
    bar = to_bar(TIMINGS[1])
    assert (bar.layer, bar.stage, bar.part, bar.op) == (0, "attn", 1, "attention")
    bar = to_bar(TIMINGS[5])
    assert (bar.layer, bar.stage, bar.part, bar.op) == (None, "head", 0, "sample")
    with pytest.raises(ValueError, match="'x' is no label of an op"):
        to_bar(Timing("x", "compute", 0, 1))


def test_a_layer_comes_with_what_ran_beside_it():
    assert [bar.begin_us for bar in bars_of_layer(TIMINGS, 1)] == [0, 5, 10, 19]
    with pytest.raises(ValueError, match="layer 7 did not run: the step has layers 0 to 2"):
        bars_of_layer(TIMINGS, 7)


def test_drawing_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    panels = [Panel("measured", TIMINGS), Panel("predicted", TIMINGS[2:5])]
    lanes = {"compute": ", 3 threads", "memory": ", 1 thread", "idle": ""}
    draw_lanes(panels, lanes, 1, "a title", tmp_path / "lanes.png")
    assert (tmp_path / "lanes.png").read_bytes().startswith(PNG_SIGNATURE)
