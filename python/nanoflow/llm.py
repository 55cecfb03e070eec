"""The user's interface: a model that generates text for prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nanoflow._core import Schedule
from nanoflow.batch_runner import BatchRunner
from nanoflow.front import Front
from nanoflow.loading.chat_template import ChatTemplate
from nanoflow.outputs import RequestOutput
from nanoflow.prompts import (
    Messages,
    Prompt,
    PromptLike,
    check_variables,
    parse_conversations,
    parse_prompts,
)
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer


class LLM(Front):
    """A model with its tokenizer, KV cache and scheduler. Its methods may be called by any thread.

    `LLM(model, **arguments)` takes the arguments of `nanoflow.config.EngineArgs`: vLLM's names and
    defaults. Close it, or use it as a context manager, to free its memory at a known time.
    `limits` are its sizes, `memory` says where the device's memory went (`memory.table()`), and
    `start_seconds` how long the phases of its start took.
    On a CPU the same request with the same seed gets the same tokens, to the last bit of their
    log-probabilities, whatever runs beside it and however it is scheduled, preempted or found in a
    cache. By default GPUs do not promise that: a step's rows choose the kernels of its products,
    what else it holds how attention divides a request's keys, and schedule="auto" changes schedules
    as it runs. So last bits differ, and where two tokens nearly tie, the token and all behind it.
    `batch_invariant=True` keeps the bits on one GPU as well, with one kernel for all products and
    attention that divides no request's keys, which costs throughput.
    Raises TypeError on an argument that there is not, ValueError on a value that is wrong or not
    supported, FileNotFoundError when the model is not there, EngineError when the engine fails.
    """

    def __init__(self, model: str | Path, **arguments: Any) -> None:
        super().__init__(model, arguments)
        self._runner = BatchRunner(self.args, self._runtime.loop, self._processor, self._status)

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
        return self._runner.run(parsed, sampling_params, use_tqdm, priority, timeout, order)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, written as prompts by the model's chat template.

        A content is a text, or a list of parts {"type": "text", "text": ...}.
        `chat_template`: Jinja, instead of the model's own. `continue_final_message`: the model goes
        on with the last message; add_generation_prompt must be False then. `tools` and
        `chat_template_kwargs` are handed to the template. Errors as generate(); ValueError also
        without a chat template, or when it refuses a conversation.
        """
        conversations = parse_conversations(messages)
        variables = dict(check_variables(chat_template_kwargs))
        if tools is not None:
            variables["tools"] = list(tools)
        template = None if chat_template is None else ChatTemplate(chat_template)
        tokenizer = self.get_tokenizer()
        prompts = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                chat_template=template,
                continue_final_message=continue_final_message,
                **variables,
            )
            prompts.append(Prompt(text=text, add_special_tokens=False))
        return self._runner.run(prompts, sampling_params, use_tqdm)

    def abort(self) -> None:
        """Ends all open requests of any thread with what they have generated, at once.

        Their generate() and chat() return, with finish_reason "abort".
        """
        self._runtime.loop.abort_all()

    def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError when it was left out by skip_tokenizer_init."""
        return self._processor.get_tokenizer()

    def set_schedule(self, schedule: str | Path | Schedule) -> None:
        """Steps run with this schedule from now on, those of open requests too.

        `schedule`: as the LLM's argument; "auto" only where that was it. Raises ValueError on one
        that there is not, EngineError on one that does not fit the device or the weights' layout.
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
