"""Programs of the simulator against plans of the engine."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings

from engine_driver import load_engine
from nanoflow import _core
from nanoflow.schedule import BUILT_IN, built_in_schedule
from nanoflow.tune.improve import neighbours, repaired
from nanoflow.tune.program import program_of
from nanoflow.tune.simulate import Cost, LaneWidths, simulate, steady
from test_schedule_invariance import schedules
from tiny_models import write_tiny_llama

LAYERS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> _core.Engine:
    model = write_tiny_llama(tmp_path_factory.mktemp("llama"), num_layers=LAYERS)
    return load_engine(model, _core.Schedule("sequential", [_core.LaneSpec("all", 4)]))


def part_of(op: _core.NanoOp) -> tuple[str, int]:
    """("mlp.1", 2) of "layers.2.mlp.1 gemm"."""
    _, layer, part = op.name.split(" ")[0].split(".", 2)
    return part, int(layer)


def planned(engine: _core.Engine, schedule: _core.Schedule) -> _core.Plan:
    engine.set_schedule(schedule)
    return engine.plans([8] * (len(schedule.cuts()) + 1), 4)[0]


def issue_of(plan: _core.Plan) -> list[tuple[str, int]]:
    issue = [part_of(op) for op in plan.ops]
    return [item for i, item in enumerate(issue) if i == 0 or item != issue[i - 1]]


def waits_of(plan: _core.Plan) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return {(part_of(op), part_of(plan.ops[dep])) for op in plan.ops for dep in op.deps}


def check(schedule: _core.Schedule, plan: _core.Plan) -> None:
    """The same order on the same lanes, and the program keeps every wait of the plan."""
    program = program_of(schedule)
    names = [task.name for task in program.tasks]
    issue = [(names[task], layer) for task, layer in program.issue(LAYERS)]
    assert issue == issue_of(plan)
    for op in plan.ops:
        lane = program.tasks[names.index(part_of(op)[0])].lane
        assert plan.lanes[op.lane].name == schedule.lanes[lane].name
    before: dict[tuple[str, int], set[tuple[str, int]]] = {}
    last: dict[int, tuple[str, int]] = {}
    for index, layer in program.issue(LAYERS):
        task = program.tasks[index]
        direct = set(task.waits(layer, LAYERS))
        direct |= {last[task.lane]} if task.lane in last else set()
        before[task.name, layer] = direct.union(*(before[other] for other in direct))
        last[task.lane] = (task.name, layer)
    assert all(other in before[one] for one, other in waits_of(plan))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_schedules_as_planned(engine: _core.Engine, name: str) -> None:
    schedule = built_in_schedule(name, 4)
    check(schedule, planned(engine, schedule))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schedule=schedules())
def test_any_schedule_as_planned(engine: _core.Engine, schedule: _core.Schedule) -> None:
    check(schedule, planned(engine, schedule))


def test_an_order_the_planner_refuses_is_refused() -> None:
    lanes = [_core.LaneSpec("all", 1)]
    wrong = _core.Schedule("wrong", lanes, {}, ["qkv.0", "o.0", "mlp.0", "attn.0"])
    costs = [Cost(1.0)] * 4
    with pytest.raises(ValueError, match=r"o\.0 of layer 0 is issued before attn\.0"):
        simulate(program_of(wrong), costs, LaneWidths({}))


def test_ping_pong_hides_attention() -> None:
    """Two halves of 10 µs attention and 30 µs products each: a layer takes the products' time."""
    program = program_of(built_in_schedule("overlap", 132))
    us = {"qkv": 5.0, "attn": 10.0, "o": 5.0, "mlp": 20.0}
    costs = [Cost(us[task.name.split(".")[0]], kind=task.name[:4]) for task in program.tasks]
    found = steady(program, costs, LaneWidths({}))
    assert found.period_us == pytest.approx(60)
    assert found.layers_us(32) - found.layers_us(31) == pytest.approx(60)
    slower = steady(program, costs, LaneWidths({("mlp.", "attn"): 2.0}))
    # Attention is beside o for 5 µs, then beside the mlp for 5, which gets half of them done.
    assert slower.period_us == pytest.approx(60 + 2 * 2.5)


def test_side_by_side_no_more_is_read_than_memory_lets_through() -> None:
    attention, product = Cost(10.0, kind="memory", moved=300.0), Cost(5.0, moved=100.0)
    limited = LaneWidths({}, bytes_per_us=25.0)
    assert limited.speeds([attention, product]) == pytest.approx([0.5, 0.5])
    assert limited.speeds([attention]) == [1.0]  # as measured
    assert limited.speeds([product, Cost(5.0)]) == [1.0, 1.0]
    assert LaneWidths({}).speeds([attention, product]) == [1.0, 1.0]
    # Slowed as pairs they read 15 + 20 a µs.
    both = LaneWidths({("memory", "compute"): 2.0}, bytes_per_us=28.0)
    assert both.speeds([attention, product]) == pytest.approx([0.4, 0.8])


def test_tasks_keep_to_lanes_and_order() -> None:
    program = program_of(built_in_schedule("overlap", 132))
    costs = [Cost(1.0 + i) for i in range(len(program.tasks))]
    spans = simulate(program, costs, LaneWidths({}), layers=4)
    ends = {(program.tasks[s.task].name, s.layer): s.end_us for s in spans}
    for lane in (0, 1):
        mine = [span for span in spans if program.tasks[span.task].lane == lane]
        assert all(a.end_us <= b.begin_us for a, b in itertools.pairwise(mine))
    for span in spans:
        assert span.end_us - span.begin_us == pytest.approx(costs[span.task].us)
        for awaited in program.tasks[span.task].waits(span.layer, 4):
            assert ends[awaited] <= span.begin_us


def test_neighbours_are_orders_of_the_same_tasks() -> None:
    program = program_of(built_in_schedule("overlap", 132))
    found = list(neighbours(program))
    assert len({other.order for other in found}) > 5
    for other in found:
        assert sorted(task for task, _ in other.order) == list(range(len(program.tasks)))
        simulate(other, [Cost(1.0)] * len(program.tasks), LaneWidths({}))
        assert repaired(other, other.order) == other
