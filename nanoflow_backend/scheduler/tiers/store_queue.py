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
    urgent: bool = False  # it is worth keeping in any case, and goes before others


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

    def offer(self, waiting: Waiting) -> None:
        """The device holds this content now."""
        content = waiting.content
        known = content in self._waiting
        if not known and not waiting.urgent and self._keep == "seen_twice" and not self._seen_before(content):
            return
        self._waiting[content] = waiting  # it may be in another page by now, which another step fills
        if waiting.urgent:
            self._urgent.append(content)
        elif not known:
            self._others.append(content)

    def next(self, returned_step: int) -> Waiting | None:
        """Whose turn it is; None: nobody's, or the step that fills it has not come back."""
        for queue in (self._urgent, self._others):
            while queue:
                waiting = self._waiting.get(queue[0])
                if waiting is None:
                    queue.popleft()
                elif waiting.step <= returned_step:
                    return waiting
                else:
                    break
        return None

    def remove(self, content: bytes) -> None:
        """It need not wait any more."""
        del self._waiting[content]

    def _seen_before(self, content: bytes) -> bool:
        if content in self._seen:
            del self._seen[content]
            return True
        self._seen[content] = None
        if len(self._seen) > self._most_seen:
            self._seen.popitem(last=False)
        return False
