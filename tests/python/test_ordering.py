"""The order in which the requests of a batch begin."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow import LLM, SamplingParams
from nanoflow.ordering import PREFIX_TOKENS, order_prompts
from nanoflow.request import Request
from test_policy import sampling
from tiny_models import write_tiny_llama


def prompt(ids: list[int] | np.ndarray, generated: int, *, samples: int = 1) -> list[Request]:
    ids = np.asarray(ids, np.int32)
    make = lambda: Request(  # noqa: E731
        "", ids, sampling(ignore_eos=True), len(ids) + generated, lambda _: None
    )
    return [make() for _ in range(samples)]


def random_prompt(rng: np.random.Generator, length: int, generated: int) -> list[Request]:
    return prompt(rng.integers(0, 1000, length), generated)


def used(requests: list[Request]) -> tuple[float, float]:
    """Rows of products, and keys read while decoding."""
    compute = memory = 0.0
    for request in requests:
        generated = request.max_len - len(request.prompt_token_ids)
        compute += request.max_len
        memory += generated * (len(request.prompt_token_ids) + generated / 2)
    return compute, memory


def test_what_has_begun_uses_both_resources_in_proportion() -> None:
    rng = np.random.default_rng(0)
    kinds = [(2000, 30)] * 60 + [(50, 500)] * 60 + [(400, 200)] * 30
    samples = [random_prompt(rng, *kind) for kind in kinds]
    order = order_prompts(samples)
    assert sorted(order) == list(range(150))
    compute, memory = used([samples[i][0] for i in range(150)])
    largest = max(used(own)[1] for own in samples)
    begun: list[Request] = []
    for index in order:
        begun += samples[index]
        c, m = used(begun)
        assert abs(m - c * memory / compute) <= 1.1 * largest
    in_order: list[Request] = [samples[i][0] for i in range(60)]
    c, m = used(in_order)
    assert abs(m - c * memory / compute) > 10 * largest, "the order given is one-sided"


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 200), st.integers(1, 100)),
        min_size=1,
        max_size=10,
    ),
    seed=st.integers(0, 99),
)
def test_prompts_that_begin_alike_stay_together(
    groups: list[tuple[int, int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    samples, group_of = [], []
    for number, (size, more, generated) in enumerate(groups):
        beginning = rng.integers(0, 1000, PREFIX_TOKENS)
        for _ in range(size):
            samples.append(prompt(np.concatenate([beginning, rng.integers(0, 9, more)]), generated))
            group_of.append(number)
    shuffled = rng.permutation(len(samples)).tolist()
    order = order_prompts([samples[i] for i in shuffled])
    assert sorted(order) == list(range(len(samples)))
    runs = [group_of[shuffled[i]] for i in order]
    changes = sum(a != b for a, b in pairwise(runs))
    assert changes == len(groups) - 1


def test_prompts_that_could_not_be_run_are_left_out() -> None:
    assert order_prompts([]) == []
    assert order_prompts([prompt([1], 3), [], prompt([2], 3, samples=2)]) in ([0, 2], [2, 0])


def test_an_llm_gives_outputs_in_the_order_of_the_prompts(tmp_path: object) -> None:
    model = write_tiny_llama(tmp_path, tokenizer=True)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    lengths = [(50, 2), (3, 40), (20, 10)] * 6
    prompts = [rng.integers(3, 150, length).tolist() for length, _ in lengths]
    params = [
        SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True)
        for _, generated in lengths
    ]
    with LLM(model, max_model_len=64, block_size=8, max_num_seqs=4, device="cpu") as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False, order="auto")
        with pytest.raises(ValueError, match="order='best' is unknown; known: fcfs, auto"):
            llm.generate(prompts, params, order="best")
    for ids, output, one in zip(prompts, outputs, expected, strict=True):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == one.outputs[0].token_ids
    started = [output.metrics.first_token_time for output in outputs if output.metrics]
    assert started != sorted(started), "they began in another order"
