"""The simulator against the ablation of NanoFlow's paper, and the search against its schedule."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import paper_a100 as paper
from nanoflow.tune.improve import descend, improve, repaired
from nanoflow.tune.program import Program
from nanoflow.tune.simulate import Cost, steady


def iteration_ms(program: Program, shares: Mapping[str, float]) -> float:
    costs = [paper.cost(task.name, shares) for task in program.tasks]
    return steady(program, costs, paper.INTERFERENCE).period_us * paper.LAYERS / 1e3


def test_three_bars_of_the_ablation() -> None:
    split = paper.program(lambda _: 0)  # nano-batches on one lane: nothing overlaps
    whole = [
        Cost(paper.cost(task.name, {}).us / paper.SPLIT_COST, kind="compute")
        for task in split.tasks
    ]
    bars = {
        "sequential": steady(split, whole, paper.INTERFERENCE).period_us * paper.LAYERS / 1e3,
        "nano": iteration_ms(split, paper.SHARES),
        "overlap": iteration_ms(paper.program(), paper.SHARES),
    }
    assert bars == pytest.approx(paper.ABLATION_MS, rel=0.05)
    assert bars["sequential"] == pytest.approx(sum(paper.ALONE_MS.values()), rel=1e-6)
    assert bars["overlap"] < bars["sequential"] < bars["nano"]


def test_search_finds_a_schedule_no_worse_than_the_papers() -> None:
    """From the order of sequential nano-batches and one share for all."""
    made = paper.program()
    stages = ["kqv", "gemv", "pf", "ag_attn", "o1", "ag_o1", "o2", "ar_o2", "ug", "d", "ar"]
    in_turn = sorted(
        made.order,
        key=lambda item: next(
            i for i, stage in enumerate(stages) if made.tasks[item[0]].name.startswith(stage)
        ),
    )
    program = repaired(made, tuple(in_turn))
    assert program is not None
    shares = dict.fromkeys(paper.SHARES, 0.2)
    for _ in range(2):
        program, _ = improve(program, lambda p, s=shares: iteration_ms(p, s), 200)
        choices = dict.fromkeys(shares, (0.1, 0.2, 0.3, 0.4, 0.5))
        shares, found = descend(shares, choices, lambda s, p=program: iteration_ms(p, s))
    assert found <= iteration_ms(paper.program(), paper.SHARES)
