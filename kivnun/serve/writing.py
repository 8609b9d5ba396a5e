"""One choice of an answer while it is written: tokens in; pieces of text, with their tokens, out.

Text that may be the beginning of a stop string is held back, and tokens with it, so that those told are those shown.
Next: `stop_text.py`, `scheduler.py` (who writes).
"""

from __future__ import annotations

from collections import deque

from kivnun.data.tokenizer import StreamDecoder, Tokenizer
from kivnun.serve.protocol import TokenLogprobs
from kivnun.serve.stop_text import StopText


class Writing:
    """The text of one choice. `spelt` are special tokens that are shown as they are written; others give no text."""

    def __init__(self, tokens: Tokenizer, stop: tuple[str, ...], spelt: tuple[int, ...]) -> None:
        self._tokens, self._spelt = tokens, spelt
        self._decoder = StreamDecoder(tokens)
        self._text = StopText(stop)
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()  # with the place in the text where each begins
        self._read = self._shown = 0  # letters decoded, and shown
        self.count = 0

    @property
    def stopped(self) -> bool:
        """Return whether a stop string has come: nothing more is shown."""
        return self._text.ended

    def token(self, token: int, logprobs: TokenLogprobs | None) -> tuple[str, list[TokenLogprobs]]:
        """Take a token; return the text that may be shown now, and the tokens that it begins."""
        self.count += 1
        if logprobs is not None:
            self._waiting.append((self._read, logprobs))
        spelt = token in self._spelt
        text = self._decoder.finish() + self._tokens.decode([token]) if spelt else self._decoder.push(token)
        self._read += len(text)
        return self._show(self._text.push(text))

    def finish(self) -> tuple[str, list[TokenLogprobs]]:
        """Return the rest."""
        rest = self._decoder.finish()
        self._read += len(rest)
        text, tokens = self._show(self._text.finish(rest))
        return text, tokens if self.stopped else [*tokens, *(told for _, told in self._waiting)]

    def _show(self, text: str) -> tuple[str, list[TokenLogprobs]]:
        self._shown += len(text)
        told: list[TokenLogprobs] = []
        while self._waiting and self._waiting[0][0] < self._shown:
            told.append(self._waiting.popleft()[1])
        return text, told
