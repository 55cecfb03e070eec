"""Admission that does not foresee what the KV cache will come to hold."""

from __future__ import annotations

from collections.abc import Iterator

from nanoflow.request import Request
from nanoflow.scheduler.admission import Admission
from nanoflow.scheduler.forecast import Forecast, Outlook
from nanoflow.scheduler.slots import Ints, Slots
from nanoflow.scheduler.waiting import WaitingQueue

SIGHTED_STEPS = 50


class NoOutlook(Outlook):
    def peak(self) -> int:
        return 0


class NoForecast(Forecast):
    def outlook(self, slots: Slots, running: Ints) -> Outlook:
        return NoOutlook(slots.page_size, running, running)


class ForecastNowAndThen(Forecast):
    """Foresees nothing every other SIGHTED_STEPS, so that pages run out."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def step(self, slots: Slots) -> None:
        super().step(slots)
        self._steps += 1

    def outlook(self, slots: Slots, running: Ints) -> Outlook:
        if self._steps // SIGHTED_STEPS % 2:
            return NoOutlook(slots.page_size, running, running)
        return super().outlook(slots, running)


class AdmitWhatFits(Admission):
    """As vLLM: whoever's prompt fits into the pages that are free now begins."""

    def __init__(self, num_pages: int, num_slots: int, page_size: int) -> None:
        super().__init__(num_pages, num_slots, page_size)
        self.forecast = NoForecast()

    def offer(self, waiting: WaitingQueue, running: int) -> Iterator[Request]:
        return iter(waiting)
