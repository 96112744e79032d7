"""Waiting for what other threads or processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], patience_s: float = 60.0) -> None:
    """Return once the condition holds. Raises: AssertionError, it never came true."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)
