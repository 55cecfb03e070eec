"""The user's interface: a model that generates text for prompts."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nanoflow._core import Schedule
from nanoflow.config import check_timeout, make_args
from nanoflow.energy import open_meter
from nanoflow.errors import EngineError, RequestError, TextError
from nanoflow.memory import MemoryUse
from nanoflow.metrics import STATUS_SECONDS, Metric, StatusLine, make_metrics
from nanoflow.models.config import ModelConfig
from nanoflow.ordering import ORDERS, order_prompts
from nanoflow.outputs import RequestOutput
from nanoflow.processor import Processor
from nanoflow.progress import Progress
from nanoflow.prompts import Messages, Prompt, PromptLike, parse_conversations, parse_prompts
from nanoflow.request import Request
from nanoflow.runtime import start_runtime
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler.stats import StepListener
from nanoflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class LLM:
    """A model with its tokenizer, KV cache and scheduler. Its methods may be called by any thread.

    `LLM(model, **arguments)` takes the arguments of `nanoflow.config.EngineArgs`: vLLM's names and
    defaults. Close it, or use it as a context manager, to free its memory at a known time.
    `limits` are its sizes, `memory` says where the device's memory went (`memory.table()`), and
    `start_seconds` how long the phases of its start took.
    Raises TypeError on an argument that there is not, ValueError on a value that is wrong or not
    supported, FileNotFoundError when the model is not there, EngineError when the engine fails.
    """

    def __init__(self, model: str | Path, **arguments: Any) -> None:
        self.args = make_args({"model": model, **arguments})
        self._runtime = start_runtime(self.args)
        self.limits = self._runtime.limits
        self.start_seconds = self._runtime.start_seconds
        self._processor = Processor(self._runtime, self.args.seed)
        self._numbers = itertools.count()
        self._meter = open_meter(self._runtime.memory.device, self.args.tensor_parallel_size)
        self._status = StatusLine(
            self._runtime.state.stats, is_on=not self.args.disable_log_stats, meter=self._meter
        )
        self._finalizer = weakref.finalize(self, self._runtime.loop.close)

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        timeout: float | None = None,
        order: str = "fcfs",
    ) -> list[RequestOutput]:
        """Generates for one prompt or many; outputs are in the order of the prompts.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        `sampling_params`: one for all, one for each, or None for `get_default_sampling_params()`.
        `priority`: of each; with scheduling_policy="priority", lower ones go first.
        `timeout`: seconds that each may take, waiting included; then it ends with what there is,
        finish_reason "abort" and stop_reason "timeout".
        `order`: in which prompts begin; "auto" mixes long prompts with long answers, so that every
        step has use for all of the device.
        A prompt that cannot be run fails alone: its output has finish_reason "error" and says why
        in `error`, and a warning is logged. ValueError is raised when no prompt can be run,
        TypeError on anything of a wrong type, EngineError when the engine fails.
        """
        parsed = parse_prompts(prompts)
        return self._run(parsed, sampling_params, use_tqdm, priority, timeout, order)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, written as prompts by the model's chat template.

        `chat_template_kwargs` are handed to the template. Errors as generate(); ValueError also
        without a chat template, or when it refuses a conversation.
        """
        conversations = parse_conversations(messages)
        tokenizer = self.get_tokenizer()
        prompts = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            assert isinstance(text, str)
            prompts.append(Prompt(text=text, add_special_tokens=False))
        return self._run(prompts, sampling_params, use_tqdm)

    def abort(self) -> None:
        """Ends all open requests of any thread with what they have generated, at once.

        Their generate() and chat() return, with finish_reason "abort".
        """
        self._runtime.loop.abort_all()

    def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError when it was left out by skip_tokenizer_init."""
        return self._processor.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, else the defaults; a new object."""
        return self._processor.default_params()

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._runtime.vocab_size

    @property
    def model_config(self) -> ModelConfig:
        """The model's dimensions and traits."""
        return self._runtime.model

    @property
    def device_description(self) -> str:
        """The device and how it is used, in words."""
        return self._runtime.device

    @property
    def memory(self) -> MemoryUse:
        """Where the device's memory is, without what sleeps."""
        return self._runtime.current_memory()

    @property
    def step_listener(self) -> StepListener | None:
        """Called in the scheduler's thread with a StepStats after every step; must not block."""
        return self._runtime.loop.step_listener

    @step_listener.setter
    def step_listener(self, listener: StepListener | None) -> None:
        self._runtime.loop.step_listener = listener

    def get_metrics(self) -> list[Metric]:
        """Of this moment: Counter, Gauge and Histogram of `nanoflow.metrics`, with vLLM's names."""
        return make_metrics(self._runtime.state.stats(), str(self.args.model), self._meter)

    def set_schedule(self, schedule: str | Path | Schedule) -> None:
        """Steps run with this schedule from now on, those of open requests too.

        `schedule`: as the LLM's argument, but not "auto". Raises ValueError on one that there is
        not, EngineError on one that does not fit the device or the weights' layout.
        """
        self._runtime.use_schedule(schedule)

    def reset_prefix_cache(self) -> bool:
        """Lets requests from now on find nothing of earlier ones in the KV cache. Returns True."""
        self._runtime.loop.forget_prefixes()
        return True

    def sleep(self, level: int = 1) -> None:
        """Gives the memory of the device to others until wake_up(), and forgets all prefixes.

        The KV cache, buffers and graphs are freed. Level 1 keeps the weights in host memory, level
        2 discards them: wake_up() then reads the model again. Does nothing while asleep.
        Raises ValueError on another level; EngineError while requests are open, with
        kv_offloading_size, and when the weights find no room on the host (wake_up() helps then).
        """
        self._runtime.sleep(level)

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Ends a sleep: all of it, or what `tags` names of "weights" and "kv_cache".

        Requests may come again once nothing sleeps; they are answered as before, from an empty KV
        cache. Raises ValueError on another tag; EngineError, and sleeps on, when the device has no
        room for what it gave, or when the engine has failed.
        """
        self._runtime.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Whether anything sleeps; generate() raises EngineError as long."""
        return bool(self._runtime.loop.asleep)

    def close(self) -> None:
        """Aborts what is running and stops the engine. May be called more than once."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
        timeout: float | None = None,
        order: str = "fcfs",
    ) -> list[RequestOutput]:
        params = self._params_of_each(sampling_params, len(prompts))
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if len(priorities) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(priorities)} priorities")
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; known: {', '.join(ORDERS)}")
        for one in priorities:
            self.args.check_priority(one)
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
        self._runtime.loop.submit(requests)
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
            self._runtime.loop.abort([request.id for request in requests])
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
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(
            isinstance(one, SamplingParams) for one in params
        ):
            raise TypeError("sampling_params must be a SamplingParams, a list of them, or None")
        if len(params) != count:
            raise ValueError(f"there are {count} prompts but {len(params)} sampling_params")
        return list(params)
