"""Text as it may be shown while it is written: nothing of a stop string, nor of what could still become one.

Next: `scheduler.py` and `worker.py` (who write).
"""

from __future__ import annotations


class StopText:
    """Text cut before the first stop string: what could be its beginning is held back until that is known."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.ended = False

    def push(self, text: str) -> str:
        """Return what may be shown now."""
        if self.ended:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.ended = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self, text: str) -> str:
        """Return the rest, where no stop string came."""
        shown = self.push(text)
        rest, self._held = ("" if self.ended else self._held), ""
        return shown + rest

    def _overlap(self, stop: str) -> int:
        """Return how much of the end of the text is a beginning of `stop`."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
