"""StoreQueue holds contents that wait to be copied to the tier below, and says which of them are worth it."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Literal, NamedTuple

Keep = Literal["all", "seen_twice"]


class Waiting(NamedTuple):
    """Content that the device holds."""

    content: bytes
    parent: bytes | None  # content of the page before; None: it is a first page
    step: int  # that fills it


class StoreQueue:
    """First come, first served.

    Args:
        keep: "all" content is worth keeping; or what was "seen_twice": computed a second time, or asked for after it
            was computed. A conversation's last answer is then kept from the next round on.
        most_seen: contents whose first sight is remembered.
    """

    def __init__(self, keep: Keep, most_seen: int) -> None:
        self._keep = keep
        self._most_seen = most_seen
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # once
        self._waiting: dict[bytes, Waiting] = {}
        self._urgent: deque[bytes] = deque()
        self._others: deque[bytes] = deque()  # of these two, some are not waiting any more

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, waiting: Waiting, *, urgent: bool = False) -> None:
        """The device holds this content now. `urgent`: it is worth keeping in any case, and goes before others."""
        content = waiting.content
        known = content in self._waiting
        if not known and not urgent and self._keep == "seen_twice" and not self._seen_before(content):
            return
        self._waiting[content] = waiting  # it may be in another page by now, which another step fills
        if urgent:
            self._urgent.append(content)
        elif not known:
            self._others.append(content)

    def take(self, returned_step: int) -> Waiting | None:
        """The next one; None if there is none, or the step that fills it has not come back."""
        for queue in (self._urgent, self._others):
            while queue:
                waiting = self._waiting.get(queue[0])
                if waiting is not None and waiting.step > returned_step:
                    break
                queue.popleft()
                if waiting is not None:
                    del self._waiting[waiting.content]
                    return waiting
        return None

    def _seen_before(self, content: bytes) -> bool:
        if content in self._seen:
            del self._seen[content]
            return True
        self._seen[content] = None
        if len(self._seen) > self._most_seen:
            self._seen.popitem(last=False)
        return False
