"""The steady state of a throughput run, from the log of its steps.

In the long run each output token costs one decode row and brings mean input / mean output prompt
tokens with it. A window of a run seldom has just that mix: the batch may be filling up, or requests
of equal length may enter and leave in bursts. So two rates are taken of every window:

- counted: prompt and output tokens in the window, a second;
- from output: output tokens in the window, a second, x (mean input + mean output) / mean output.

They agree when as many requests enter as leave. `SteadyState.tokens_per_second` is the lower one:
a window that got more than its share of prompts (cheap tokens) says less, not more. Prompt tokens
are rows computed, so those that a preempted request computes again count in the first rate only.

Where schedules take turns, lengths that vary give each another mix: see `long_run_rates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Protocol

DEFINITION = (
    "the lower of (a) prompt and output tokens of the window a second and (b) its output tokens a "
    "second x (mean input + mean output) / mean output"
)


class Step(Protocol):
    """What the steady state needs of a completed step."""

    @property
    def time_done(self) -> float: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SteadyState:
    """What happened in a window, and the mean lengths of the workload's requests."""

    seconds: float
    steps: int
    prompt_tokens: int
    output_tokens: int
    mean_input: float
    mean_output: float

    @property
    def counted_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def output_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def from_output_per_second(self) -> float:
        return self.output_per_second * (self.mean_input + self.mean_output) / self.mean_output

    @property
    def tokens_per_second(self) -> float:
        return min(self.counted_per_second, self.from_output_per_second)

    @property
    def step_ms(self) -> float:
        return self.seconds / self.steps * 1e3

    def counts(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "definition": DEFINITION,
            **asdict(self),
            "counted_tok_s": self.counted_per_second,
            "from_output_tok_s": self.from_output_per_second,
            "prompt_per_output": self.prompt_tokens / self.output_tokens,
            "prompt_per_output_in_the_long_run": self.mean_input / self.mean_output,
        }


def together(states: Sequence[SteadyState]) -> SteadyState:
    """Several windows of one workload as one."""
    first = states[0]
    return SteadyState(
        seconds=sum(state.seconds for state in states),
        steps=sum(state.steps for state in states),
        prompt_tokens=sum(state.prompt_tokens for state in states),
        output_tokens=sum(state.output_tokens for state in states),
        mean_input=first.mean_input,
        mean_output=first.mean_output,
    )


def long_run_rates(windows: Mapping[str, Sequence[SteadyState]]) -> dict[str, float]:
    """Total tokens a second of each of several schedules, where prompts and outputs come in the
    proportion of the long run; {} where no two windows tell what that is.

    A window takes k (output tokens + p x prompt tokens), with a k of each schedule and one p for
    all, which is fitted to all windows: so none is favoured for having had the cheaper tokens.
    """
    if max(map(len, windows.values()), default=0) < 2:
        return {}
    prompt_cost = min(
        (step / 100 for step in range(201)),
        key=lambda cost: sum(_spread(of_one, cost) for of_one in windows.values()),
    )
    rates = {}
    for name, of_one in windows.items():
        mean_input, mean_output = of_one[0].mean_input, of_one[0].mean_output
        seconds = mean(_costs(of_one, prompt_cost)) * (mean_output + prompt_cost * mean_input)
        rates[name] = (mean_input + mean_output) / seconds
    return rates


def _costs(windows: Sequence[SteadyState], prompt_cost: float) -> list[float]:
    """Seconds of an output token, in each window."""
    return [w.seconds / (w.output_tokens + prompt_cost * w.prompt_tokens) for w in windows]


def _spread(windows: Sequence[SteadyState], prompt_cost: float) -> float:
    """Sum of squares, in parts of the mean."""
    costs = _costs(windows, prompt_cost)
    return sum((cost / mean(costs) - 1) ** 2 for cost in costs)


def window(
    steps: Sequence[Step], begin: int, end: int, mean_input: float, mean_output: float
) -> SteadyState | None:
    """From the end of step `begin` to that of step `end`; None when nothing was generated."""
    chosen = steps[begin + 1 : end + 1]
    seconds = steps[end].time_done - steps[begin].time_done if chosen else 0.0
    output = sum(step.output_tokens for step in chosen)
    if seconds <= 0 or output == 0:
        return None
    prompt = sum(step.prefill_tokens for step in chosen)
    return SteadyState(seconds, len(chosen), prompt, output, mean_input, mean_output)


def steady_state(
    steps: Sequence[Step], mean_input: float, mean_output: float
) -> SteadyState | None:
    """The window of a whole run without ramp-up (no request has ended yet) and tail (none is left
    to admit): from the step at whose end the first request had completed to the last one that left
    requests waiting.

    None when the run has no such window: all requests were running before the first ended.
    Requests may still arrive during the first steps, so the first completion is the first fall of
    the number of open requests from its peak.
    """
    if not steps:
        return None
    unfinished = [step.running + step.waiting for step in steps]
    peak = max(unfinished)
    first_at_peak = unfinished.index(peak)
    begin = next((i for i, n in enumerate(unfinished) if i > first_at_peak and n < peak), None)
    end = max((i for i, step in enumerate(steps) if step.waiting), default=-1)
    if begin is None:
        return None
    return window(steps, begin, end, mean_input, mean_output)
