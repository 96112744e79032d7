"""The ledger is a client's book of its requests: each is opened once and ends once, in a way that its kind allows."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# How a request may end. Interrupted: the engine had it when it was killed. The last two are the client's own doing.
ANSWERED, DEADLINE, UNAVAILABLE, INVALID = "answered", "deadline", "unavailable", "invalid"
INTERRUPTED = "interrupted"
CANCELLED, DISCONNECTED = "cancelled", "disconnected"
ALLOWED = {
    "plain": {ANSWERED, UNAVAILABLE},
    "deadline": {ANSWERED, UNAVAILABLE, DEADLINE},
    "cancel": {ANSWERED, UNAVAILABLE, CANCELLED},
    "malformed": {INVALID, UNAVAILABLE},
    "slow": {ANSWERED, UNAVAILABLE},  # its client does not read for a while, so nothing of it is timed
}
SAYS_DEADLINE = re.compile("timeout: not done")
SAYS_KILLED = re.compile("the engine is gone: .*( SIGKILL|it made no step)")
SAYS_UNAVAILABLE = re.compile("waiting|engine|unload|is not ready|is not at ready state|queue")


@dataclass(eq=False)
class Entry:
    kind: str
    sent_s: float
    timeout_s: float = math.inf
    tokens: int = 0  # of the responses so far


class Refusal(NamedTuple):
    after_ms: float  # the request was sent
    at_s: float  # of time.monotonic()
    message: str


@dataclass
class Ledger:
    """Thread-safe. `faults` are what must not be: they are kept, in words, and the soak goes on."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (kind, end)
    refusals: list[Refusal] = field(default_factory=list)  # UNAVAILABLE and INVALID_ARG
    late_ms: list[float] = field(default_factory=list)  # of requests with a timeout, how long after it they ended
    faults: list[str] = field(default_factory=list)
    killed_s: float = -math.inf  # when the engine last was; inf: it will be, nobody knows when
    open: set[Entry] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, kind: str, timeout_s: float = math.inf) -> Entry:
        entry = Entry(kind, time.monotonic(), timeout_s)
        with self._lock:
            self.open.add(entry)
        return entry

    def end(self, entry: Entry, how: str, message: str = "") -> None:
        with self._lock:
            if entry not in self.open:
                self.faults.append(f"a {entry.kind} request that had ended also ended as {how}")
                return
            self.open.remove(entry)
            self.ends[entry.kind, how] += 1
            if how not in {*ALLOWED[entry.kind], INTERRUPTED, DISCONNECTED}:
                self.faults.append(f"a {entry.kind} request ended as {how}")
            now_s = time.monotonic()
            if entry.timeout_s < math.inf:
                self.late_ms.append(1e3 * (now_s - entry.sent_s - entry.timeout_s))
            if how in (UNAVAILABLE, INVALID) and entry.kind != "slow":
                self.refusals.append(Refusal(1e3 * (now_s - entry.sent_s), now_s, message))

    def refuse(self, entry: Entry, message: str) -> None:
        """An error came."""
        if SAYS_DEADLINE.search(message):
            self.end(entry, DEADLINE)
        elif SAYS_KILLED.search(message) and entry.sent_s < self.killed_s:
            self.end(entry, INTERRUPTED)
        elif SAYS_UNAVAILABLE.search(message):
            self.end(entry, UNAVAILABLE, message)
        elif entry.kind == "malformed":
            self.end(entry, INVALID, message)
        else:
            self.end(entry, f"error {message!r}")

    def answer(self, entry: Entry, new_tokens: int, total_tokens: int | None) -> None:
        """A response came; the last one says how many tokens there are in all."""
        entry.tokens += new_tokens
        if total_tokens is not None:
            self.end(entry, ANSWERED if entry.tokens == total_tokens else f"{entry.tokens} of {total_tokens} tokens")

    def count(self, *ends: str) -> int:
        return sum(number for (_, how), number in self.ends.items() if how in ends)
