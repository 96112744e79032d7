"""StopStrings ends a text at its first stop string and shows no part of one before it is known not to be one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Fed a text piece by piece. Of several stop strings the one completed first counts; of two completed by the same
    character, the longer: so the result does not depend on where the pieces are cut.

    Attributes:
        matched: the stop string that ended the text, when there is one; feed nothing more then.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """With `include` the stop string itself is shown, and so nothing needs to be held back."""
        self.matched: str | None = None
        self._stops = stops
        self._include = include
        self._tail = ""  # the longest end of the text that begins a stop string

    def feed(self, text: str, may_stop: bool = True) -> str:
        """Add text; returns what has become safe to show. Stop strings that end in it count if it `may_stop`."""
        if not self._stops or not text:
            return text
        seen = len(self._tail)
        pending = self._tail + text
        if may_stop and (match := self._first_match(pending, seen)):
            start, end = match
            self.matched = pending[start:end]
            return pending[seen:end] if self._include else pending[:start]
        held = self._possible_start(pending)
        self._tail = pending[held:]
        return text if self._include else pending[:held]

    def release(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        return "" if self._include else self._tail

    def _first_match(self, text: str, seen: int) -> tuple[int, int] | None:
        """(start, end) of the match that ends first after text[:seen], the longest of those."""
        finds = ((text.find(stop, max(0, seen - len(stop) + 1)), len(stop)) for stop in self._stops)
        matches = [(start + length, start) for start, length in finds if start >= 0]
        if not matches:
            return None
        end, start = min(matches)
        return start, end

    def _possible_start(self, text: str) -> int:
        """Where the longest end of the text begins that is the beginning, not the whole, of a stop string."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                else:
                    start = text.find(stop[0], start + 1)
        return first
