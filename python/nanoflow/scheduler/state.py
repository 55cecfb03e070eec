"""The scheduler without its thread: queues, slots and pages, as steps start and complete."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanoflow.errors import InvalidLogitsError, StepError
from nanoflow.offload.offload import Offload
from nanoflow.request import FinishReason, Request
from nanoflow.scheduler.admission import Admission
from nanoflow.scheduler.ends import find_ends
from nanoflow.scheduler.engine import StepResult
from nanoflow.scheduler.forecast import Fate
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.prefix import Prefix, PrefixCache
from nanoflow.scheduler.scoring import find_scored, take_scores
from nanoflow.scheduler.slots import Ints, Slots, SlotState
from nanoflow.scheduler.stats import Counters, SchedulerStats
from nanoflow.scheduler.step import Step
from nanoflow.scheduler.victims import Victims
from nanoflow.scheduler.waiting import WaitingQueue


class SchedulerState:
    """All requests that have not finished, and the slots and pages they hold. Not thread-safe."""

    def __init__(
        self,
        policy: Policy,
        slots: Slots,
        pages: PageAllocator,
        *,
        shares_prefixes: bool = True,
        offload: Offload | None = None,
        waiting: WaitingQueue | None = None,
    ) -> None:
        """`shares_prefixes`: requests that begin alike share the full pages of their beginning.
        `offload`: where pages are copied to, which needs shares_prefixes."""
        self.slots = slots
        self.pages = pages
        self.offload = offload
        self._prefixes = PrefixCache(slots, pages, is_on=shares_prefixes, offload=offload)
        self._victims = Victims(slots, pages, offload)
        self.policy = policy
        self.admission = Admission(pages.num_pages, len(slots.requests), slots.page_size)
        self.counters = Counters()
        self._waiting = WaitingQueue() if waiting is None else waiting
        self._age_of: dict[str, int] = {}  # by priority, then number: who is lower goes first
        self._next_age = 0
        self._free_slots = list(range(len(slots.requests)))[::-1]
        self._slot_of: dict[str, int] = {}  # running and preempted
        self._leaving: list[int] = []  # slots that steps in flight may still name
        self._last_step = 0  # started
        self.arrived_step = 0  # whose tokens have arrived

    @property
    def num_waiting(self) -> int:
        return len(self._age_of) - len(self.slots.running)

    @property
    def num_running(self) -> int:
        return len(self.slots.running)

    @property
    def has_requests(self) -> bool:
        return bool(self._age_of)

    def stats(self) -> SchedulerStats:
        """May be called by any thread, which may then see some of a step's changes already."""
        usage = 1 - self.pages.num_free / self.pages.num_pages
        offload = None if self.offload is None else self.offload.stats()
        return self.counters.snapshot(self.num_running, max(0, self.num_waiting), usage, offload)

    def open_requests(self) -> list[Request]:
        """All that have not finished."""
        return [*self._waiting, *map(self.slots.request, self._slot_of.values())]

    def add(self, request: Request) -> None:
        """Queues a request behind all of its priority. Raises ValueError on an id in use and
        QueueFullError."""
        if request.id in self._age_of:
            raise ValueError(f"request id {request.id!r} is in use")
        self._waiting.check_room(request)
        self._age_of[request.id] = (request.priority << 32) + self._next_age
        self._next_age += 1
        self._waiting.add(request)

    def end(
        self,
        request_id: str,
        reason: FinishReason,
        time: float,
        *,
        stop_reason: str | int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Finishes a request, if it is here; what its steps in flight still sample is dropped."""
        if self._age_of.pop(request_id, None) is None:
            return
        request = self._waiting.pop(request_id)
        if request is None:
            slot = self._slot_of.pop(request_id)
            request = self.slots.request(slot)
            request.output_token_ids = self.slots.generated(slot)
            request.first_token_time = float(self.slots.first_token_time[slot])
            if self.slots.state[slot] == SlotState.RUNNING:
                self._release(slot, SlotState.ENDED)
            else:
                self.slots.state[slot] = SlotState.ENDED
        else:
            self._prefixes.withdraw(request)
        if reason in ("stop", "length"):
            if not request.is_length_certain:
                fate = Fate.ENDED if reason == "stop" else Fate.CUT
                self.admission.forecast.end(request, fate)
            self.counters.forecast.add(request.expected_tokens, len(request.output_token_ids))
        self.counters.finished[reason] += 1
        request.finish(reason, time, stop_reason=stop_reason, error=error)

    def forget_prefixes(self) -> None:
        """Requests that start from now on find nothing of earlier ones."""
        self.pages.forget()
        if self.offload is not None:
            self.offload.forget()

    def reclaim(self, completed_step: int) -> None:
        """Takes back pages and slots that only steps up to `completed_step` used.

        A slot also waits until the tokens of those steps have arrived; a preempted request queues
        again with them. A page waits for its copies, which are done with the step behind theirs.
        """
        if self.offload is not None and self.offload.settled_step == self._last_step:
            self.pages.reclaim(self._last_step + 1)
        else:
            self.pages.reclaim(completed_step)
        arrived = min(completed_step, self.arrived_step)
        slots, still_leaving, back = self.slots, [], []
        for slot in self._leaving:
            if slots.last_step[slot] > arrived:
                still_leaving.append(slot)
                continue
            if slots.state[slot] == SlotState.PREEMPTED:
                back.append(slots.request(slot))
                self._queue_again(slot)
            slots.free(slot)
            self._free_slots.append(slot)
        self._leaving = still_leaving
        for request in back:
            self._waiting.put_back(request, self._age_of)

    def start_step(self) -> Step:
        """Plans the next step and books its pages, slots and tokens. Its plan may be empty."""
        self.admission.forecast.step(self.slots)
        plan = self.policy.next_step(
            self.slots,
            self._admissible(),
            self._free_slots,
            self.pages.num_free,
            self.pages.num_retired,
            self.admission.forecast,
            self._victims,
            len(self._waiting),
            self.admission.pace,
        )
        self.counters.preemptions += len(plan.preempted)
        for slot in plan.preempted:
            self.slots.request(slot).num_preemptions += 1
            self._release(slot, SlotState.PREEMPTED)
        for prefix in plan.prefixes:  # all, before a page is granted anew
            self.pages.share(prefix.pages)
        for (slot, request), prefix in zip(plan.admitted, plan.prefixes, strict=True):
            self._admit(slot, request, prefix)
        if plan.is_empty:
            return Step(self._last_step, plan, np.empty(0, np.bool_), find_scored(self.slots, plan))
        self._last_step += 1
        slots = self.slots
        stored = slots.computed[plan.slots] + plan.rows
        self._grant(plan.slots, slots.pages_for(stored) - slots.num_pages[plan.slots])
        slots.computed[plan.slots] = stored
        slots.last_step[plan.slots] = self._last_step
        self._prefixes.register_full_pages(self._last_step)
        samples = stored >= slots.prefill_len[plan.slots]
        moves = () if self.offload is None else self.offload.take_moves()
        return Step(self._last_step, plan, samples, find_scored(slots, plan), *moves)

    def complete_step(self, step: Step, result: StepResult, time: float) -> None:
        """Takes the sampled tokens of a step, in order, and finishes requests that they end."""
        self.arrived_step = step.number
        slots, logprobs = self.slots, result.logprobs
        sampled = step.plan.slots[step.samples]
        tokens = result.tokens[: len(sampled)]
        if logprobs is not None:
            take_scores(slots, step.scoring, len(sampled), logprobs)
        takes = slots.takes_tokens(sampled)
        rows = np.flatnonzero(takes)
        sampled, tokens = sampled[takes], tokens[takes]
        valid = tokens >= 0
        for slot in sampled[~valid].tolist():
            error = InvalidLogitsError(slots.request(slot).id, len(slots.generated(slot)))
            self.end(slots.request(slot).id, "error", time, error=error)
        sampled, tokens, rows = sampled[valid], tokens[valid], rows[valid]
        known = slots.known[sampled]
        slots.tokens[sampled, known] = tokens
        slots.known[sampled] = known + 1
        first = sampled[known == slots.prompt_len[sampled]]
        slots.first_token_time[first] = time
        self.counters.prompt_tokens += int(slots.prompt_len[first].sum())
        self.counters.generation_tokens += len(tokens)
        if logprobs is not None:
            slots.take_logprobs(sampled, rows, logprobs)
        slots.stream(sampled, tokens)
        for end in find_ends(slots, sampled, tokens):
            name = slots.request(end.slot).id
            self.end(name, end.reason, time, stop_reason=end.stop_reason, error=end.error)

    def fail_running(self, cause: Exception, last_step: int, time: float) -> int:
        """Finishes all that run, as the engine has failed, and returns how many they were.

        It has taken steps up to `last_step`, of which none is on its way. What the device held is
        lost; requests that wait, or were preempted, load or compute theirs anew.
        """
        self._last_step = self.arrived_step = last_step
        self.pages.forget()
        running = [self.slots.request(slot).id for slot in self.slots.running.tolist()]
        for request_id in running:
            self.end(request_id, "error", time, error=StepError(request_id, cause))
        return len(running)

    def check_integrity(self) -> None:
        """Asserts that slots and pages add up and that every request is in one place."""
        slots = self.slots
        self.pages.check_integrity()
        if self.offload is not None:
            self.offload.check_integrity()
        held = [slots.pages_of(slot) for slot in slots.running.tolist()]
        users = np.bincount(
            np.concatenate([np.empty(0, np.int32), *held]), minlength=self.pages.num_pages
        )
        assert np.array_equal(users, self.pages.users()), "pages held are not those granted"
        states = [int(np.sum(slots.state == state)) for state in SlotState]
        assert states[SlotState.FREE] == len(self._free_slots) == len(set(self._free_slots))
        assert states[SlotState.RUNNING] == len(slots.running)
        assert states[SlotState.PREEMPTED] + states[SlotState.ENDED] == len(self._leaving)
        assert np.all(np.diff(slots.age[slots.running]) > 0), "running requests are not by age"
        for name, slot in self._slot_of.items():
            assert slots.request(slot).id == name
            assert slots.state[slot] in (SlotState.RUNNING, SlotState.PREEMPTED)
        assert self._age_of.keys() == {r.id for r in self._waiting} | self._slot_of.keys()
        ages = [self._age_of[request.id] for request in self._waiting]
        assert ages == sorted(ages), "the queue is not by age"
        running = slots.running
        stored, known = slots.computed[running], slots.known[running]
        assert np.all(stored <= slots.num_pages[running] * slots.page_size)
        assert np.all(known >= stored - 1), "more than two tokens are in flight"
        assert np.all((known <= stored + 1) | (known == slots.prefill_len[running]))
        assert np.all(known < slots.max_len[running]), "a request is past its end"

    def _admissible(self) -> Iterable[tuple[Request, Prefix]]:
        """Nobody overtakes a preempted request whose last token is in flight."""
        if np.any(self.slots.state[self._leaving] == SlotState.PREEMPTED):
            return ()
        self._prefixes.prefetch(self._waiting)
        offered = self.admission.offer(self._waiting, self.num_running)
        return self._prefixes.admissible(offered, len(self.slots.requests))

    def _admit(self, slot: int, request: Request, prefix: Prefix) -> None:
        self._waiting.pop(request.id)
        self.admission.charge(request)
        if request.num_preemptions == 0:
            request.number = self.admission.forecast.begin()
        assert self._free_slots.pop() == slot
        self._slot_of[request.id] = slot
        pages = self._prefixes.load(request, prefix)
        self.slots.assign(slot, request, self._age_of[request.id], pages)
        self.admission.forecast.draw(self.slots, np.array([slot]))
        self._prefixes.admit(slot)
        if request.num_preemptions == 0:
            request.expected_tokens = self.admission.forecast.steps_left(request)
            request.num_cached_tokens = int(self.slots.computed[slot])
            if self._prefixes.is_on:
                self.counters.prefix_queries += len(request.prompt_token_ids)
                self.counters.prefix_hits += len(prefix.pages) * self.slots.page_size

    def _release(self, slot: int, state: SlotState) -> None:
        self._prefixes.release(slot)
        self.pages.retire(self.slots.pages_of(slot), int(self.slots.last_step[slot]))
        self.slots.num_pages[slot] = 0
        self.slots.leave([slot], state)
        self._leaving.append(slot)

    def _queue_again(self, slot: int) -> None:
        request = self.slots.request(slot)
        request.output_token_ids = self.slots.generated(slot)
        request.first_token_time = float(self.slots.first_token_time[slot])
        del self._slot_of[request.id]

    def _grant(self, takers: Ints, counts: Ints) -> None:
        """Appends so many free pages to those of each taker."""
        total = int(counts.sum())
        if total > 0:
            self.slots.append_pages(takers, counts, self.pages.grant(total))
