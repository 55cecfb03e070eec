"""Whether it pays to bring pages back from a tier, from rates measured while the engine runs."""

from __future__ import annotations

from time import perf_counter

_WEIGHT = 0.2  # of a new observation
_MIN_ROWS = 64  # a step with fewer is about other things than prompts
RETRY_SECONDS = 30.0  # behind the last copy, whose rate says nothing of the next from then on


class Rate:
    """Amounts a second: an average in which later observations weigh more."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0
        self._time = 0.0  # of the last observation

    def observe(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            self._amount += _WEIGHT * (amount - self._amount)
            self._seconds += _WEIGHT * (seconds - self._seconds)
            self._time = perf_counter()

    @property
    def value(self) -> float | None:
        """None before the first observation."""
        return self._amount / self._seconds if self._seconds else None

    @property
    def is_old(self) -> bool:
        """Whether nothing has been observed for RETRY_SECONDS, or ever."""
        return perf_counter() > self._time + RETRY_SECONDS


class CostModel:
    """Compares the time to copy pages with the time to compute them again.

    What has not been measured yet, or not for long, is taken to be worth a try: a disk that was
    slow once is not left alone for ever.
    """

    def __init__(self, page_bytes: int, page_size: int) -> None:
        self.page_bytes = page_bytes
        self._page_size = page_size
        self._prefill = Rate()  # tokens

    def observe_step(self, prefill_rows: int, decodes: int, seconds: float) -> None:
        """A step has taken so long; those that mostly decode say nothing of prompts."""
        rows = prefill_rows + decodes
        if rows >= _MIN_ROWS and prefill_rows >= rows // 2:
            self._prefill.observe(rows, seconds)

    def compute_seconds(self, pages: int) -> float | None:
        """For the tokens of so many pages; None before a prompt has been seen."""
        rate = self._prefill.value
        return None if rate is None else pages * self._page_size / rate

    def tokens_meanwhile(self, pages: int, bandwidth: Rate) -> float:
        """Tokens that are computed while so many pages arrive; 0 before both have been seen."""
        rate, prefill = bandwidth.value, self._prefill.value
        if rate is None or prefill is None:
            return 0.0
        return pages * self.page_bytes / rate * prefill

    def is_worth(self, pages: int, bandwidth: Rate, backlog: int = 0) -> bool:
        """Whether `pages` behind `backlog` others arrive before they would be computed.

        `bandwidth`: bytes a second.
        """
        rate, compute = bandwidth.value, self.compute_seconds(pages)
        if rate is None or compute is None or bandwidth.is_old:
            return True
        return (pages + backlog) * self.page_bytes / rate <= compute
