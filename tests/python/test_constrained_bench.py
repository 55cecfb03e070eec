"""bench/constrained.py: what its rows say of its runs."""

from __future__ import annotations

import pytest

from constrained import KINDS, Run, params_of, summarise
from nanoflow.bench.datasets import Request


def test_rows_are_medians_beside_the_plain_run() -> None:
    plain = [Run(2.0, 3.0, 2.0, 64), Run(8.0, 4.0, 8.0, 64), Run(1.0, 4.0, 1.0, 64)]
    mixed = [Run(3.0, 5.0, 2.5, 96), Run(4.0, 6.0, 3.0, 96), Run(9.0, 5.0, 2.0, 96)]
    none, some, every = summarise(
        {("none", 0.0): plain, ("json", 0.25): mixed, ("json", 1.0): [Run(6.0, 4.0, None, 64)]},
        1000,
    )
    assert (none.total_token_throughput, none.seconds_of_unconstrained) == (500.0, 1.0)
    assert (some.seconds, some.seconds_of_unconstrained, some.steps) == (4.0, 2.0, 96)
    assert some.plain_seconds_of_unconstrained == pytest.approx(1.25)
    assert (none.cpu_seconds, some.cpu_seconds_of_unconstrained) == (4.0, 1.25)
    assert every.plain_seconds_of_unconstrained is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_valid_and_of_full_length(kind: str) -> None:
    params = params_of(Request([5, 6], 9), KINDS[kind])
    params.check()
    assert (params.max_tokens, params.min_tokens) == (9, 9)
