"""Throws random requests at small engines: `python tests/python/fuzz.py --requests 100000`.

Engines are real, with a tiny random model on the CPU, and too small a KV cache for what comes,
which half of the time is not foreseen.
Requests come from few prompts and parameters, so that most come again: whatever ran beside them,
and whether they were preempted or found in a cache, they must get the same tokens.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.request import Request
from nanoflow.scheduler.forecast import Outlook
from tiny_models import write_tiny_llama

VOCAB_SIZE = 400  # of the tokenizer
MAX_MODEL_LEN = 64
PER_EXAMPLE = 40  # requests at most
TIMEOUT = 60.0  # seconds until a hanging run fails
SIZES: dict[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 20,
    "scheduling_policy": "priority",
    "device": "cpu",
    "cpu_threads": 1,
    "disable_log_stats": True,
}
ENGINES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_prefix_caching": False, "async_scheduling": False},
    {"kv_offloading_size": 0.001},
    {"kv_offloading_size": 0.0001, "kv_offloading_ssd": "ssd:0.0005"},  # in the folder of the run
    {"schedule": "nano", "max_num_queued_reqs": 20},
    {"schedule": "tp-overlap", "tensor_parallel_size": 2, "cpu_threads": 4},
)


@dataclass(frozen=True)
class Asked:
    """A request to be made, or, with `aborts`, one of those before it to be aborted."""

    prompt: int
    length: int
    params: tuple[tuple[str, Any], ...]
    priority: int = 0
    timeout: float | None = None
    aborts: int | None = None
    bad_token: int | None = None

    @property
    def is_bad(self) -> bool:
        """Whether it must be refused."""
        given = dict(self.params)
        return (
            not 0 < self.length < MAX_MODEL_LEN
            or self.bad_token is not None
            or VOCAB_SIZE in given.get("allowed_token_ids", ())
            or (given.get("temperature") == 0.0 and given.get("n", 1) > 1)
        )


LIMITS: tuple[dict[str, Any], ...] = (  # on what may be sampled, one for a request
    *[{}] * 6,
    {"logit_bias": {5: 3.0, 99: -100.0, VOCAB_SIZE - 1: 3.0}},
    {"allowed_token_ids": [*range(3, VOCAB_SIZE, 7)]},
    {"bad_words": ["the", "of their", "e"]},
    {"structured_outputs": StructuredOutputsParams(choice=["the fox", "a dog again and again"])},
    {"structured_outputs": StructuredOutputsParams(regex="([a-z]{3} )+")},
    {"allowed_token_ids": [5, VOCAB_SIZE]},  # which it has not
)
options = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 30), "seed": st.integers(0, 2)},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "top_k": st.sampled_from([1, 20]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "min_tokens": st.integers(0, 1),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=3),
        "stop": st.sampled_from(["e", "th", "no such string"]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 3),
        "n": st.integers(1, 3),
    },
)
params = st.builds(lambda given, limit: given | limit, options, st.sampled_from(LIMITS))
asked = st.builds(
    Asked,
    prompt=st.integers(0, 4),
    length=st.integers(0, MAX_MODEL_LEN + 2),
    params=params.map(lambda given: tuple(sorted(given.items()))),
    priority=st.integers(-2, 2),
    timeout=st.sampled_from([None] * 8 + [1e-4, 5e-3]),
    aborts=st.sampled_from([None] * 20 + [0, 1, 5]),
    bad_token=st.sampled_from([None] * 20 + [-1, VOCAB_SIZE]),
)
# What every engine is asked, so that each ends some requests in every way, and preempts some.
_TO_THE_END = (("ignore_eos", True), ("max_tokens", 30), ("seed", 0))
_TO_A_STOP = (("allowed_token_ids", [5]), ("seed", 0), ("stop_token_ids", [5]))
LENGTHS = [Asked(prompt, 4, _TO_THE_END) for prompt in range(5)]
STOPS = [Asked(0, 4, _TO_A_STOP)]


@dataclass
class Fuzzer:
    """An engine under fire, checked after every step."""

    llm: LLM
    broken: list[BaseException] = field(default_factory=list)
    known: dict[Any, list[int]] = field(default_factory=dict)  # tokens of what ran to its end
    done: queue.SimpleQueue[Request] = field(default_factory=queue.SimpleQueue)
    number: int = 0
    finished: int = 0

    def __post_init__(self) -> None:
        self.llm.step_listener = self.check

    def check(self, _: Any) -> None:
        try:
            self.llm._runtime.state.check_integrity()
        except BaseException as error:  # the listener must not raise
            self.broken.append(error)

    def fire(self, requests: Sequence[Asked], aborts_all: bool) -> None:
        loop = self.llm._runtime.loop
        open_: dict[str, tuple[Request, Any]] = {}
        ids: list[str] = []
        for one in requests:
            for request in self.make(one):
                open_[request.id] = (
                    request,
                    (one.prompt, one.length, repr(one.params), request.index),
                )
                ids.append(request.id)
                loop.submit([request])
            if one.aborts is not None and ids:
                loop.abort([ids[-1 - one.aborts % len(ids)]])
        if aborts_all:
            loop.abort_all()
        deadline = time.monotonic() + TIMEOUT
        for _ in range(len(open_)):
            request = self.done.get(timeout=max(0.0, deadline - time.monotonic()))
            request, key = open_.pop(request.id)
            self.judge(request, key)
        assert not open_ and self.done.empty()
        if self.broken:
            raise self.broken[0]

    def make(self, one: Asked) -> list[Request]:
        tokens = np.random.default_rng(one.prompt).integers(3, VOCAB_SIZE, one.length)
        if one.bad_token is not None and one.length:
            tokens[one.length // 2] = one.bad_token
        self.number += 1
        try:
            given = SamplingParams(**dict(one.params))
            made = self.llm._processor.make_requests(
                self.number, tokens.tolist(), given, self.done.put
            )
        except ValueError:
            assert one.is_bad, "a good request is refused"
            return []
        assert not one.is_bad, "a bad request is accepted"
        for request in made:
            request.priority = one.priority
            if one.timeout is not None:
                request.timeout = one.timeout
        return made

    def judge(self, request: Request, key: Any) -> None:
        tokens = request.output_token_ids
        self.finished += 1
        if request.finish_reason in ("stop", "length"):
            assert self.known.setdefault(key, tokens) == tokens, f"{key} got other tokens"
            if request.finish_reason == "length":
                assert len(tokens) == request.max_len - len(request.prompt_token_ids)
        elif request.finish_reason == "abort":
            whole = self.known.get(key)
            assert whole is None or tokens == whole[: len(tokens)]
        else:
            assert "the queue is full" in str(request.error), request.error

    def close(self) -> None:
        """Nothing may be left behind."""
        self.llm.step_listener = None
        self.llm.close()
        state = self.llm._runtime.state
        state.reclaim(state.arrived_step)
        state.check_integrity()
        assert not state.has_requests
        assert state.pages.num_free == state.pages.num_pages, "pages are lost"
        if state.offload is not None:
            state.offload.check_idle()


def make_llm(model: Path, options: dict[str, Any]) -> LLM:
    """Of small sizes; an SSD's folder lies in the model's."""
    options = dict(options)
    if "kv_offloading_ssd" in options:
        options["kv_offloading_ssd"] = f"{model}/{options['kv_offloading_ssd']}"
    return LLM(model, **{**SIZES, **options})


def fuzz(requests: int, folder: Path) -> list[Fuzzer]:
    """Fires at least so many requests at all engines together."""
    model = write_tiny_llama(folder, tokenizer=True)
    fuzzers = [Fuzzer(make_llm(model, options)) for options in ENGINES]
    examples = max(1, 3 * requests // (len(fuzzers) * PER_EXAMPLE))  # some are refused
    for fuzzer in fuzzers:
        _shoot(fuzzer, examples)
    for fuzzer in fuzzers:
        fuzzer.close()
    return fuzzers


def _shoot(fuzzer: Fuzzer, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(
            Phase.explicit,
            Phase.generate,
        ),  # an engine that has failed once is no subject to shrink on
        suppress_health_check=list(HealthCheck),
    )
    @given(
        requests=st.lists(asked, min_size=PER_EXAMPLE // 2, max_size=PER_EXAMPLE),
        aborts_all=st.sampled_from([False] * 7 + [True]),
        is_blind=st.booleans(),
    )
    @example(requests=STOPS + LENGTHS, aborts_all=False, is_blind=False)
    @example(requests=LENGTHS, aborts_all=True, is_blind=False)
    @example(requests=2 * LENGTHS, aborts_all=False, is_blind=True)
    def shoot(requests: list[Asked], aborts_all: bool, is_blind: bool) -> None:
        if fuzzer.broken:  # what is tried again is the example, on an engine that is not the same
            raise fuzzer.broken[0]
        blind = mock.patch.object(Outlook, "peak", lambda self: 0)
        try:
            with blind if is_blind else nullcontext():
                fuzzer.fire(requests, aborts_all)
        except Exception as error:
            fuzzer.broken.append(error)
            raise

    shoot()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzers = fuzz(options.requests, Path(folder))
    for fuzzer, engine in zip(fuzzers, ENGINES, strict=True):
        counters = fuzzer.llm._runtime.state.counters
        print(
            f"{fuzzer.finished} requests, {len(fuzzer.known)} kinds, {counters.preemptions} "
            f"preemptions, {dict(counters.finished)}: {engine}"
        )
    print(f"nothing was lost in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
