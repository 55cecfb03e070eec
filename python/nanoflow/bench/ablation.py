"""`bench throughput --ablate`: what nano-batches cost, and what their overlap brings; `--compare`:
any schedules beside each other.

The same requests under three schedules, as in the paper's ablation (figure 9): one op after the
other; the nano-batches of the schedule in question, but nothing beside anything; that schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow._core import Schedule
from nanoflow.bench import environment
from nanoflow.bench.steady import SteadyState, long_run_rates
from nanoflow.config import EngineArgs
from nanoflow.devices import make_backends
from nanoflow.schedule import AUTO, built_in_schedule, find_schedule, without_overlap

Result = dict[str, Any]


def ablation_schedules(arguments: Mapping[str, Any]) -> list[Schedule]:
    """sequential, nano, and the LLM's schedule; where its arguments name none, "overlap", or
    "tp-overlap" of several ranks.

    Raises ValueError where that one overlaps nothing.
    """
    usual = "overlap" if EngineArgs(**arguments).ranks == 1 else "tp-overlap"
    args = EngineArgs(**{"schedule": usual, **arguments})
    width = make_backends(args)[0].width
    schedule = find_schedule(args.schedule, width)
    if len(schedule.lanes) < 2:
        raise ValueError(
            f"--ablate needs a schedule of several lanes; {schedule.id!r} has "
            f"{len(schedule.lanes)}, so nothing overlaps"
        )
    return [built_in_schedule("sequential", width), without_overlap(schedule, width), schedule]


def find_schedules(names: Sequence[str], arguments: Mapping[str, Any]) -> list[Schedule | str]:
    """By name or from files, for the device of an LLM with these arguments; "auto" as it is.

    Raises ValueError on one that there is not, two of one id, or an "auto" that is not the first:
    an LLM chooses no more once it has been told a schedule.
    """
    if AUTO in names[1:]:
        raise ValueError(f"--compare {' '.join(names)}: auto can only be the first")
    width = make_backends(EngineArgs(**arguments))[0].width
    schedules = [name if name == AUTO else find_schedule(name, width) for name in names]
    ids = [schedule if isinstance(schedule, str) else schedule.id for schedule in schedules]
    if len(set(ids)) < len(ids):
        raise ValueError(f"--compare needs schedules of different ids, not {', '.join(ids)}")
    return schedules


def compare(results: Sequence[Result]) -> Result:
    """Results of several schedules, with the first."""
    first = results[0]
    runs = {found["schedule"]: found for found in results}
    return {
        "benchmark": "ablation",
        "workload": first["workload"],
        "model": first["model"],
        "device": first["device"],
        "command": environment.command_line(),
        "total_tok_s": {name: rate(run) for name, run in runs.items()},
        "relative": {name: rate(run) / rate(first) for name, run in runs.items()},
        "long_run_tok_s": long_run_rates({name: _windows(run) for name, run in runs.items()}),
        "runs": runs,
    }


def rate(run: Mapping[str, Any]) -> float:
    """Total tokens a second: of the steady state where that was measured."""
    key = "steady_total_tok_s" if run["measured"] == "steady state" else "total_tok_s"
    return float(run[key])


def _windows(run: Mapping[str, Any]) -> list[SteadyState]:
    """None of a whole run, which has no other mix than the others."""
    state = run.get("steady_state") or {}
    return [
        SteadyState(**window, mean_input=state["mean_input"], mean_output=state["mean_output"])
        for window in state.get("windows", ())
    ]


def table(found: Mapping[str, Any]) -> str:
    long_run: Mapping[str, float] = found["long_run_tok_s"]
    lines = [
        f"{'schedule':20}{'total tok/s':>12}{'relative':>10}{'output tok/s':>14}{'step ms':>9}"
        + f"{'at the long run mix':>21}{'relative':>10}" * bool(long_run)
    ]
    for name, run in found["runs"].items():
        line = (
            f"{name:20}{found['total_tok_s'][name]:12.0f}{found['relative'][name]:10.3f}"
            f"{run['output_tok_s']:14.0f}{run['step_ms']:9.2f}"
        )
        if long_run:
            line += f"{long_run[name]:21.0f}{long_run[name] / next(iter(long_run.values())):10.3f}"
        lines.append(line)
    return "\n".join(lines)


def draw_ablations(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Total tokens a second as a PNG: a group of bars for each result, a bar for each kind.

    Of schedules that overlap, the fastest is shown, and beside it what "auto" gave.
    """
    from matplotlib.figure import Figure  # slow to import, and needed here only

    kinds = [_kinds(one["total_tok_s"]) for one in found]
    names = list(dict.fromkeys(name for one in kinds for name in one))
    figure = Figure(figsize=(2.5 + 2 * len(found), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        groups = [index for index, one in enumerate(kinds) if name in one]
        rates = [kinds[index][name] for index in groups]
        bars = axes.bar(
            [index - 0.4 + (number + 0.5) * width for index in groups], rates, width, label=name
        )
        first = [next(iter(kinds[index].values())) for index in groups]
        shares = [f"{rate / one:.3f}" for rate, one in zip(rates, first, strict=True)]
        axes.bar_label(bars, shares, fontsize=8)
    axes.set_xticks(range(len(found)), [f"{one['model']}\n{one['workload']}" for one in found])
    axes.set_ylabel("total tokens/s")
    axes.set_title(" and ".join(dict.fromkeys(one["device"] for one in found)), fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _kinds(rates: Mapping[str, float]) -> dict[str, float]:
    in_turn = {name: rates[name] for name in ("sequential", "nano") if name in rates}
    others = [rate for name, rate in rates.items() if name not in (*in_turn, AUTO)]
    chosen = {AUTO: rates[AUTO]} if AUTO in rates else {}
    return in_turn | ({"overlap": max(others)} if others else {}) | chosen
