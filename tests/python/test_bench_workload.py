"""Which requests the flags of a benchmark come to: ShareGPT, the paper's traces, prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow.arguments import ArgumentParser
from nanoflow.bench.datasets import Lengths, Request
from nanoflow.bench.published import PUBLISHED, Moments, passes_filter, published_lengths
from nanoflow.bench.sharegpt import read_conversations
from nanoflow.bench.workload import Target, Workload, add_workload_arguments, make_workload
from nanoflow.tokenizer import Tokenizer
from tiny_models import write_tokenizer


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def workload(*flags: str | Path) -> Workload:
    parser = ArgumentParser()
    add_workload_arguments(parser)
    return make_workload(parser.parse_args([str(flag) for flag in flags]))


def draw(
    made: Workload, tokenizer: Tokenizer | None = None, max_total: int = 4096
) -> list[Request]:
    return made.draw(made.num_prompts, Target(max_total, 400, tokenizer), rng())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lengths_have_the_moments_of_the_paper(name):
    lengths = published_lengths(name, 60_000, 10**9, rng(), is_filtered=False)
    for side, moments in zip(("input", "output"), PUBLISHED[name], strict=True):
        values = np.array([getattr(one, side) for one in lengths])
        assert values.mean() == pytest.approx(moments.mean, rel=0.03)
        assert values.std() == pytest.approx(moments.std, rel=0.15)  # heavy tails
        assert values.min() >= 1


def test_published_lengths_are_log_normal():
    logs = np.log(Moments(1000, 500).draw(100_000, rng()))
    assert np.median(logs) == pytest.approx(logs.mean(), abs=0.01)


def test_the_papers_filter_leaves_out_long_requests():
    lengths = published_lengths("splitwise", 5000, 10**9, rng(), is_filtered=True)
    assert len(lengths) == 5000
    assert all(passes_filter(one) for one in lengths)
    assert max(one.input for one in lengths) > 2800
    assert not passes_filter(Lengths(3073, 1)) and not passes_filter(Lengths(1, 1025))
    assert passes_filter(Lengths(3072, 1024)) and not passes_filter(Lengths(3072, 1025))


def test_published_lengths_must_fit_the_model():
    assert (
        max(
            r.input + r.output for r in published_lengths("lmsys", 50, 99, rng(), is_filtered=False)
        )
        <= 99
    )
    with pytest.raises(ValueError, match="hardly any request of splitwise fits into 2 tokens"):
        published_lengths("splitwise", 100, 2, rng(), is_filtered=False)


def test_published_workloads_are_named_and_drawn():
    made = workload("--dataset-name", "lmsys", "--paper-filter", "--num-prompts", "7")
    assert made.name == "lmsys-filtered"
    requests = draw(made)
    assert len(requests) == 7
    assert all(max(request.prompt_token_ids) < 400 for request in requests)


def test_random_prompts_share_a_prefix():
    flags = ("--input-len", "6", "--output-len", "2", "--random-prefix-len", "5")
    made = workload(*flags, "--num-prompts", "3")
    assert made.name == "6x2-p5"
    prompts = [request.prompt_token_ids for request in draw(made)]
    assert [len(prompt) for prompt in prompts] == [11] * 3
    assert prompts[0][:5] == prompts[1][:5] == prompts[2][:5]
    assert prompts[0][5:] != prompts[1][5:]
    with pytest.raises(ValueError, match="up to 13 tokens exceed max_model_len 12"):
        draw(made, max_total=12)


def test_prefixes_are_repeated_evenly_and_in_random_order():
    sizes = {"prefix-len": 8, "suffix-len": 3, "num-prefixes": 4, "output-len": 2}
    flags = [f"--prefix-repetition-{name}={value}" for name, value in sizes.items()]
    made = workload("--dataset-name", "prefix_repetition", *flags, "--num-prompts", "10")
    assert made.name == "prefix-4x8-3x2"
    requests = draw(made)
    heads = [tuple(request.prompt_token_ids[:8]) for request in requests]
    counts = sorted(heads.count(head) for head in set(heads))
    assert counts == [2, 2, 3, 3]
    assert heads != sorted(heads, key=heads.index)
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 10
    assert {(len(one.prompt_token_ids), one.output_len) for one in requests} == {(11, 2)}
    with pytest.raises(ValueError, match="requests of 13 tokens exceed max_model_len 12"):
        draw(made, max_total=12)


def conversation(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": "someone", "value": text} for text in texts]}


QUESTION, ANSWER = "The quick brown fox jumps", "over the lazy dog, again"
SHAREGPT = [
    conversation(QUESTION, ANSWER, "a third turn"),
    conversation(ANSWER, QUESTION),
    conversation("alone"),
    conversation("x", ANSWER),  # a prompt below 4 tokens
    conversation(QUESTION, "y"),  # an output below 4 tokens
    conversation("again " * 1100, ANSWER),  # a prompt above 1024 tokens
]


@pytest.fixture
def sharegpt(tmp_path: Path) -> Path:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    return path


def test_sharegpt_takes_first_turns_of_usable_lengths(sharegpt, tokenizer):
    made = workload("--dataset-name", "sharegpt", "--dataset-path", sharegpt, "--no-oversample")
    requests = draw(made, tokenizer)
    lengths = {text: len(tokenizer.encode(text)) for text in (QUESTION, ANSWER)}
    found = {tokenizer.decode(one.prompt_token_ids): one.output_len for one in requests}
    assert found == {QUESTION: lengths[ANSWER], ANSWER: lengths[QUESTION]}
    assert len(requests) == 2


def test_sharegpt_is_oversampled_and_takes_an_output_length(sharegpt, tokenizer):
    flags = ("--dataset-name", "sharegpt", "--dataset-path", sharegpt, "--num-prompts", "9")
    assert len(draw(workload(*flags), tokenizer)) == 9
    requests = draw(workload(*flags, "--output-len", "2", "--no-oversample"), tokenizer)
    assert [request.output_len for request in requests] == [2] * 3  # that of a short answer too


def test_sharegpt_requests_must_fit(sharegpt, tokenizer):
    made = workload("--dataset-name", "sharegpt", "--dataset-path", sharegpt)
    with pytest.raises(ValueError, match="none of 5 conversations has a prompt of 4 to 1024 tok"):
        draw(made, tokenizer, max_total=6)
    with pytest.raises(ValueError, match="needs a tokenizer: no --skip-tokenizer-init"):
        draw(made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is no JSON list of conversations"),
        ("[]", "none of 0 conversations of .* has two turns"),
        ('[{"conversations": [{"value": "alone"}]}]', "none of 1 conversations"),
        ('[{"turns": []}]', r'item 0 is no {"conversations": \['),
        ('[{"conversations": [{"value": 1}, {"value": "b"}]}]', "item 0 is no"),
    ],
)
def test_files_that_are_no_sharegpt_are_told(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conversations(path)


def test_a_trace_is_filtered_and_used_once(tmp_path):
    path = tmp_path / "chats.csv"
    path.write_text("10,20\n4000,20\n30,5\n")
    made = workload(
        "--dataset-name=trace", "--dataset-path", path, "--no-oversample", "--paper-filter"
    )
    assert made.name == "chats-filtered"
    lengths = [(len(one.prompt_token_ids), one.output_len) for one in draw(made, max_total=9999)]
    assert sorted(lengths) == [(10, 20), (30, 5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset-name=sharegpt",), "--dataset-name sharegpt needs --dataset-path FILE"),
        (("--paper-filter",), "--paper-filter is for --dataset-name trace or splitwise or lmsys"),
        (("--no-oversample",), "--no-oversample is for --dataset-name trace or sharegpt"),
        (("--dataset-name=lmsys", "--input-len=5"), "--input-len is for --dataset-name random"),
        (
            ("--prefix-repetition-prefix-len=5",),
            "--prefix-repetition-prefix-len is for --dataset-name prefix_repetition",
        ),
        (
            ("--dataset-name=prefix_repetition", "--prefix-repetition-num-prefixes=0"),
            "--prefix-repetition-num-prefixes 0 must be at least 1",
        ),
        (("--random-prefix-len=-1",), "--random-prefix-len -1 must be at least 0"),
        (("--num-warmups=-1",), "--num-warmups -1 at least 0"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(ValueError, match=message):
        workload(*flags)


def test_sharegpt_output_length_flags(sharegpt):
    flags = ("--dataset-name", "sharegpt", "--dataset-path", sharegpt, "--output-len")
    with pytest.raises(ValueError, match="--output-len 0 must be at least 1"):
        workload(*flags, "0")
    with pytest.raises(ValueError, match="--sharegpt-output-len are the same: give one of them"):
        workload(*flags, "4", "--sharegpt-output-len", "4")
