"""Many prompts at once, from their texts to the last of their outputs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nanoflow.config import EngineArgs, check_timeout
from nanoflow.errors import EngineError, RequestError, TextError
from nanoflow.metrics import STATUS_SECONDS, StatusLine
from nanoflow.ordering import ORDERS, order_prompts
from nanoflow.outputs import RequestOutput
from nanoflow.processor import Processor
from nanoflow.progress import Progress
from nanoflow.prompts import Prompt
from nanoflow.request import Request
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler.loop import SchedulerLoop

logger = logging.getLogger(__name__)


class BatchRunner:
    """What is behind LLM.generate and LLM.chat. Any thread may call it."""

    def __init__(
        self, args: EngineArgs, loop: SchedulerLoop, processor: Processor, status: StatusLine
    ) -> None:
        self._args, self._loop, self._processor, self._status = args, loop, processor, status
        self._numbers = itertools.count()

    def run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
        timeout: float | None = None,
        order: str = "fcfs",
    ) -> list[RequestOutput]:
        """See LLM.generate."""
        params = self._params_of_each(sampling_params, len(prompts))
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if len(priorities) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(priorities)} priorities")
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; known: {', '.join(ORDERS)}")
        for one in priorities:
            self._args.check_priority(one)
        done: queue.SimpleQueue[Request] = queue.SimpleQueue()
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        samples: list[list[Request]] = [[] for _ in prompts]
        errors: dict[int, ValueError] = {}
        encoded = self._processor.encode(prompts)
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            number = next(self._numbers)
            try:
                if isinstance(ids, ValueError):
                    raise ids
                made = self._processor.make_requests(number, ids, params[index], done.put)
            except ValueError as error:
                errors[index] = error
                outputs[index] = self._processor.outputs.failed_output(str(number), prompt, error)
                continue
            for request in made:
                request.priority = priorities[index]
                request.timeout = check_timeout(timeout)
            samples[index] = made
        if errors:
            self._tell_errors(errors, len(prompts))
        begin = order_prompts(samples) if order == "auto" else range(len(samples))
        for index in self._finished(samples, begin, done, use_tqdm):
            outputs[index] = self._output(samples[index], prompts[index], params[index])
        return [output for output in outputs if output is not None]

    def _output(
        self, samples: Sequence[Request], prompt: Prompt, params: SamplingParams
    ) -> RequestOutput:
        maker = self._processor.outputs
        try:
            return maker.output(samples, prompt, params)
        except TextError as error:
            return maker.failed_output(samples[0].id, prompt, error)

    def _tell_errors(self, errors: Mapping[int, ValueError], count: int) -> None:
        """Raises the first where there is no prompt without."""
        first = min(errors)
        if len(errors) == count:
            raise errors[first]
        logger.warning(
            "%d of %d prompts cannot be run; prompts[%d]: %s",
            len(errors),
            count,
            first,
            errors[first],
        )

    def _finished(
        self,
        samples: Sequence[Sequence[Request]],
        order: Iterable[int],
        done: queue.SimpleQueue[Request],
        use_tqdm: bool,
    ) -> Iterator[int]:
        """Runs the samples of all prompts, in an order, and yields the index of each prompt whose
        last has finished; raises when the engine fails."""
        index_of = {request.id: index for index, own in enumerate(samples) for request in own}
        requests = [request for index in order for request in samples[index]]
        left = [len(own) for own in samples]
        self._loop.submit(requests)
        try:
            with Progress(sum(count > 0 for count in left), use_tqdm) as progress:
                for _ in requests:
                    request = self._next(done)
                    if isinstance(request.error, EngineError) and (
                        len(requests) == 1 or not isinstance(request.error, RequestError)
                    ):
                        raise request.error
                    index = index_of[request.id]
                    left[index] -= 1
                    if left[index] == 0:
                        yield index
                        progress.update(samples[index])
        except BaseException:  # an interrupt, too: nobody waits for the rest any more
            self._loop.abort([request.id for request in requests])
            raise

    def _next(self, done: queue.SimpleQueue[Request]) -> Request:
        while True:
            self._status.tick()
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=STATUS_SECONDS)

    def _params_of_each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            return [self._processor.default_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(
            isinstance(one, SamplingParams) for one in params
        ):
            raise TypeError("sampling_params must be a SamplingParams, a list of them, or None")
        if len(params) != count:
            raise ValueError(f"there are {count} prompts but {len(params)} sampling_params")
        return list(params)
