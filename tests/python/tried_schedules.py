"""Makes LLMs try schedules as they serve, a step each."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow import runtime
from nanoflow.schedule import built_in_schedule
from nanoflow.scheduler import choose
from nanoflow.scheduler.choose import Chooser, Mix
from nanoflow.tune.auto import Choice

NAMES = ("sequential", "nano", "overlap")


def try_schedules(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on LLMs try these schedules over and over; the names, as they are chosen."""
    tried: list[str] = []

    def several(args: Any, backend: Any, spec: Any) -> Choice:
        schedules = [built_in_schedule(name, backend.width) for name in NAMES]
        return Choice(schedules, lambda number, mix: float(mix.rows))

    choose_option = Chooser.choose

    def restless(chooser: Chooser, mix: Mix) -> int:
        if len(tried) % 24 < 12:
            number = choose_option(chooser, mix)
        else:
            number = len(tried) % len(chooser.options)
        tried.append(chooser.options[number].name)
        return number

    monkeypatch.setattr(runtime, "choose_schedules", several)
    monkeypatch.setattr(Chooser, "choose", restless)
    monkeypatch.setattr(choose, "TURN_SECONDS", 1e-6)
    monkeypatch.setattr(choose, "SETTLE_STEPS", 1)
    monkeypatch.setattr(choose, "SETTLE_SECONDS", 0.0)
    return tried
