"""Random requests, and storms of aborts, leave engines whole; see fuzz.py for longer runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from fuzz import ENGINES, Fuzzer, fuzz, make_llm
from nanoflow import SamplingParams
from tiny_models import write_tiny_llama


def test_random_requests_lose_nothing_and_get_the_same_tokens_again(tmp_path: Path) -> None:
    fuzzers = fuzz(2000, tmp_path)
    assert sum(fuzzer.finished for fuzzer in fuzzers) > 2000
    counters = [fuzzer.llm._runtime.state.counters for fuzzer in fuzzers]
    assert all(one.preemptions > 5 for one in counters)
    for reason in ("stop", "length", "abort"):
        assert all(one.finished[reason] > 0 for one in counters)
    again = sum(fuzzer.finished - len(fuzzer.known) for fuzzer in fuzzers)
    assert again > 500, "hardly a request came again"


def test_storms_of_aborts_leave_nothing_behind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = write_tiny_llama(tmp_path, tokenizer=True)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for options in ENGINES[:4]:
        fuzzer = Fuzzer(make_llm(model, options))
        llm = fuzzer.llm
        expected = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
        for _ in range(8):
            prompts = [rng.integers(3, 150, rng.integers(1, 24)).tolist() for _ in range(32)]
            run = threading.Thread(
                target=llm.generate, args=(prompts, params), kwargs={"use_tqdm": False}
            )
            run.start()
            while run.is_alive():
                time.sleep(float(rng.uniform(0, 0.02)))
                llm.abort()
            run.join()
        output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]
        assert output.outputs[0].token_ids == expected
        assert not fuzzer.broken
        fuzzer.close()
