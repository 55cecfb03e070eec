"""Stop strings, looked for in the text as it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.detokenizer import IncrementalDetokenizer


class StopStrings:
    """The text of one generation up to the first stop string, which may span several tokens."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        stops: Sequence[str],
        *,
        min_tokens: int,
        keep_stop: bool,
    ) -> None:
        """`min_tokens`: no stop string is seen in the text of so many first tokens.

        `keep_stop`: the text ends behind the stop string instead of before it.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._longest = max(map(len, stops))
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._tokens = 0
        self._text = ""
        self._searched_from = 0  # characters before belong to the first min_tokens tokens

    def push(self, token: int) -> str | None:
        """Takes the next token and returns the stop string that its text completes, if any."""
        begin = max(self._searched_from, len(self._text) - self._longest + 1)
        self._text += self._detokenizer.push([token])
        self._tokens += 1
        if self._tokens <= self._min_tokens:
            self._searched_from = len(self._text)
            return None
        found = [(at, stop) for stop in self._stops if (at := self._text.find(stop, begin)) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda match: match[0])
        self._text = self._text[: at + len(stop) if self._keep_stop else at]
        return stop

    def finish(self, rest: Sequence[int] = ()) -> str:
        """The text of a generation that something else ended; `rest` are tokens not pushed yet."""
        return self._text + self._detokenizer.push(rest) + self._detokenizer.flush()

    @property
    def text(self) -> str:
        """Up to the stop string, once push() has found one."""
        return self._text
