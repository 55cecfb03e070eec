"""schedule="auto": which schedules an engine starts with, and what each is predicted to take.

On a GPU they come from a run of `nanoflow tune` and a search in its op times, else in those that
the package has; while serving, `scheduler.choose` tries the ones that are predicted to be best for
the load and keeps the fastest. A GPU without op times tries the built-in overlap, and so do two
threads of a CPU; more of them run everything in turn. Where `nanoflow tune` has run, a CPU has the
one schedule that it found fastest. Several GPUs run everything in turn.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanoflow._core import Backend, Schedule
from nanoflow.config import EngineArgs
from nanoflow.limits import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from nanoflow.schedule import (
    AUTO,
    built_in_schedule,
    find_schedule,
    schedule_from_json,
    schedule_to_json,
)
from nanoflow.scheduler.choose import Chooser, Mix, Option
from nanoflow.scheduler.deal import Dealer
from nanoflow.tune.costs import CostModel, Load, Spec
from nanoflow.tune.results import device_name, key_of, load_result, save_result
from nanoflow.tune.search import search
from nanoflow.tune.table import OpTable, shipped_table, table_from_json, table_to_json

logger = logging.getLogger(__name__)

TRIED = 3  # schedules for the first of the workloads, beside sequential; one for each other
# Of a step, from which overlap is tried where nothing predicts it.
_FULL_ROWS, _FULL_ROWS_OF_TWO_THREADS = 512, 64


@dataclass(frozen=True, slots=True)
class _Workload:
    """Requests that begin and end at the same rate, at all stages."""

    prompt: int  # tokens
    output: int

    def load(self, decodes: int, rows: int) -> Load:
        """Of full steps: so many requests decode, unless more rows are for prompts then."""
        ratio = self.prompt / self.output
        decodes = max(1, min(decodes, int(rows / (1 + ratio))))
        prompts = min(round(ratio * decodes), rows - decodes)
        return Load(decodes, self.prompt + self.output // 2, prompts, self.prompt // 2)


_WORKLOADS = (_Workload(512, 512), _Workload(512, 1024), _Workload(1024, 512))


@dataclass(frozen=True, slots=True)
class Choice:
    """Schedules, the one to start with first."""

    schedules: Sequence[Schedule]
    predict: Callable[[int, Mix], float]  # as in scheduler.choose

    def chooser(self, max_num_seqs: int) -> Chooser | None:
        """None where there is nothing to choose."""
        if len(self.schedules) == 1:
            return None
        options = [Option(s.id, s, Dealer(s.cuts(), max_num_seqs)) for s in self.schedules]
        in_turn = next((i for i, s in enumerate(self.schedules) if s.id == "sequential"), None)
        return Chooser(options, self.predict, in_turn)


def choose_schedules(args: EngineArgs, backend: Backend, spec: Spec) -> Choice:
    """Raises ValueError on a schedule that there is not."""
    if args.schedule != AUTO:
        return _only(find_schedule(args.schedule, backend.width))
    sequential = built_in_schedule("sequential", backend.width)
    if args.ranks > 1:
        return _only(sequential)
    tuned = _tuned(backend, spec)
    overlap = built_in_schedule("overlap", backend.width)
    if backend.device == "cpu":
        if tuned is None and backend.width == 2:
            return Choice([sequential, overlap], _by_rows(_FULL_ROWS_OF_TWO_THREADS))
        return _only(sequential if tuned is None else tuned[1][0])
    table = shipped_table(device_name(backend)) if tuned is None else tuned[0]
    if table is None or table.width != backend.width:
        logger.info(
            "there are no op times of %s: a built-in schedule is tried; 'nanoflow tune' measures "
            "them and finds better ones",
            device_name(backend),
        )
        return Choice([sequential, overlap], _by_rows(_FULL_ROWS))
    measured = [] if tuned is None else tuned[1]
    searched = _searched(table, full_loads(args), backend, spec)
    schedules: list[Schedule] = []
    for schedule in (*measured, *searched, sequential):
        if schedule.id not in {other.id for other in schedules}:
            schedules.append(schedule)
    logger.info("schedules to choose from: %s", ", ".join(s.id for s in schedules))
    return Choice(schedules, _predictor(CostModel(table, spec), schedules))


def known_table(backend: Backend, spec: Spec) -> OpTable | None:
    """The op times that predictions for this device are made from: measured here, or shipped."""
    tuned = _tuned(backend, spec)
    return shipped_table(device_name(backend)) if tuned is None else tuned[0]


def full_loads(args: EngineArgs) -> list[Load]:
    """Steps of an engine that has as many requests as it runs at once, of several workloads."""
    decodes = args.max_num_seqs or DEFAULT_MAX_NUM_SEQS["cuda"]
    rows = max(args.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS, decodes)
    return [workload.load(decodes, rows) for workload in _WORKLOADS]


def _only(schedule: Schedule) -> Choice:
    return Choice([schedule], lambda number, mix: float(mix.rows))


def _by_rows(full: int) -> Callable[[int, Mix], float]:
    """Nothing is known: the first alone for few rows, otherwise no difference."""

    def predict(number: int, mix: Mix) -> float:
        return float(mix.rows * (1 if number == 0 or mix.rows >= full else 2))

    return predict


def _tuned(backend: Backend, spec: Spec) -> tuple[OpTable, list[Schedule]] | None:
    """The best that `nanoflow tune` measured, the fastest first."""
    key = key_of(backend, spec)
    result = load_result(key.path("tuned"), key)
    if result is None:
        return None
    measured = sorted(result["measured"], key=lambda one: -one["tokens_per_second"])
    schedules = [schedule_from_json(one["schedule"]) for one in measured[:TRIED]]
    return table_from_json(result["table"]), schedules


def _searched(
    table: OpTable, loads: Sequence[Load], backend: Backend, spec: Spec
) -> list[Schedule]:
    """The best for the first of the loads, and the best one for each other; remembered, for the
    searches take seconds."""
    basis = {"loads": [asdict(load) for load in loads], "table": _digest(table_to_json(table))}
    key = key_of(backend, spec)
    key = replace(key, model={**key.model, **basis})
    path = key.path("searched")
    result = load_result(path, key)
    if result is None:
        model = CostModel(table, spec)
        candidates = search(model, loads[0], TRIED + 1)
        candidates += [search(model, load, 2)[0] for load in loads[1:]]
        result = {"schedules": [schedule_to_json(c.schedule) for c in candidates]}
        try:
            save_result(path, key, result)
        except OSError as error:
            logger.info("the search is not remembered: %s", error)
    return [schedule_from_json(schedule) for schedule in result["schedules"]]


def _predictor(model: CostModel, schedules: Sequence[Schedule]) -> Callable[[int, Mix], float]:
    def predict(number: int, mix: Mix) -> float:
        return model.predict(schedules[number], load_of(mix)).step_us

    return predict


def load_of(mix: Mix) -> Load:
    """Requests of a step hold about as many keys each; a prompt's rows read half of them."""
    prompts = max(0, mix.rows - mix.decodes)
    requests = mix.decodes + (1 if prompts else 0)
    context = max(1, mix.keys // max(1, requests))
    return Load(mix.decodes, context, prompts, max(1, min(context, prompts) // 2))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
