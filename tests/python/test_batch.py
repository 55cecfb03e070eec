"""The arrays of a step, spelled out."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.scheduler.batch import build_batch
from test_policy import EOS, Setup, request


def arrays_of_next_step(setup: Setup) -> dict[str, list]:
    step = setup.state.start_step()
    return {k: v.tolist() for k, v in build_batch(setup.state.slots, step).items()}


def test_prefill_then_decode_of_a_token_that_has_not_arrived() -> None:
    setup = Setup(num_slots=2, page_size=4, num_pages=20)
    first = request(0, 5, 9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1)
    second = request(1, 2, 9)
    setup.add(first, second)
    arrays = arrays_of_next_step(setup)
    assert arrays == {
        "tokens": first.prompt_token_ids.tolist() + second.prompt_token_ids.tolist(),
        "positions": [0, 1, 2, 3, 4, 0, 1],
        "request_indptr": [0, 5, 7],
        "kv_len": [5, 2],
        "segment_requests": [0, 2],
        "page_indptr": [0, 2, 3],
        "page_indices": arrays["page_indices"],
        "sample_rows": [4, 6],
        "slots": [0, 1],
        "temperature": [0.5, 0.0],
        "top_p": pytest.approx([0.9, 1.0]),
        "min_p": pytest.approx([0.1, 0.0]),
        "top_k": [3, 0],
        "seed": [0, 1],
        "counter": [0, 0],
        "banned_indptr": [0, 0, 0],
        "banned": [],
    }
    assert len(set(arrays["page_indices"])) == 3
    pages = arrays["page_indices"]
    arrays = arrays_of_next_step(setup)
    assert arrays["tokens"] == [-1 - 0, -1 - 1]
    assert arrays["positions"] == [5, 2]
    assert arrays["kv_len"] == [6, 3]
    assert arrays["page_indices"] == pages
    assert arrays["counter"] == [1, 1]


def test_a_token_that_has_arrived_is_written_out() -> None:
    setup = Setup(steps_in_flight=1)
    setup.add(request(0, 5, 30, ignore_eos=True))
    setup.turn()
    arrays = arrays_of_next_step(setup)
    assert arrays["tokens"] == setup.state.slots.generated(0)


def test_a_chunk_that_ends_inside_the_prompt_samples_nothing() -> None:
    setup = Setup(max_rows=8)
    setup.add(request(0, 20, 30))
    arrays = arrays_of_next_step(setup)
    assert arrays["positions"] == list(range(8))
    assert arrays["sample_rows"] == arrays["slots"] == []
    arrays = arrays_of_next_step(setup)
    assert arrays["positions"] == list(range(8, 16))
    assert arrays["kv_len"] == [16]
    arrays = arrays_of_next_step(setup)
    assert arrays["sample_rows"] == [3]


def test_ends_are_banned_until_min_tokens() -> None:
    setup = Setup()
    setup.add(
        request(0, 3, 30, min_tokens=2, stop_token_ids=(4, 9)),
        request(1, 3, 30, stop_token_ids=(5,)),
        request(2, 3, 30, min_tokens=1, ignore_eos=True),
    )
    arrays = arrays_of_next_step(setup)
    assert arrays["banned_indptr"] == [0, 3, 3, 4]
    assert arrays["banned"] == [4, 9, EOS, EOS]
    arrays = arrays_of_next_step(setup)
    assert arrays["banned"] == [4, 9, EOS]
    arrays = arrays_of_next_step(setup)
    assert arrays["banned"] == []


def test_penalties_and_logprobs_are_given_when_somebody_asks() -> None:
    setup = Setup(max_rows=8)
    second = request(1, 9, 30, ignore_eos=True, repetition_penalty=1.5, presence_penalty=-1.0)
    setup.add(
        request(0, 3, 30, ignore_eos=True), second, request(2, 2, 30, ignore_eos=True, logprobs=0)
    )
    arrays = arrays_of_next_step(setup)
    assert not arrays.keys() & {"repetition_penalty", "logprobs"}  # request 1 is not sampled yet
    arrays = arrays_of_next_step(setup)
    assert arrays["presence_penalty"] == [0.0, -1.0, 0.0]
    assert arrays["frequency_penalty"] == [0.0, 0.0, 0.0]
    assert arrays["repetition_penalty"] == [1.0, 1.5, 1.0]
    assert arrays["history_indptr"] == [0, 0, 9, 9]
    assert arrays["history_tokens"] == second.prompt_token_ids.tolist()
    assert arrays["logprobs"] == [-1, -1, 0]
    arrays = arrays_of_next_step(setup)
    assert arrays["repetition_penalty"] == [1.0, 1.5, 1.0]
    assert arrays["history_indptr"] == [0, 0, 0, 0] and arrays["history_tokens"] == []


def test_many_stop_tokens_widen_the_table() -> None:
    setup = Setup()
    stops = tuple(range(10, 29))
    setup.add(request(0, 3, 30), request(1, 3, 30, min_tokens=1, stop_token_ids=stops))
    arrays = arrays_of_next_step(setup)
    assert arrays["banned"] == [*stops, EOS]
    assert setup.state.slots.end_ids[0, 0] == EOS


def test_segments_hold_decodes_before_chunks() -> None:
    setup = Setup(num_slots=6, max_rows=20, cuts=(0.5,))
    setup.add(*(request(n, 4, 30, ignore_eos=True) for n in range(4)))
    setup.turn()
    setup.add(*(request(n, 30, 35, ignore_eos=True) for n in range(4, 6)))
    arrays = arrays_of_next_step(setup)
    assert arrays["segment_requests"] == [0, 3, 6]
    assert np.diff(arrays["request_indptr"]).tolist() == [1, 1, 8, 1, 1, 8]
