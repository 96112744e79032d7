"""Failure is an error for one client, with the code that the server's protocols know."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Literal

from nanoflow_backend.scheduler.batch import FinishReason

MOST_CHARACTERS = 2000  # of a message: it may quote what a client sent

Code = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]
REASONS: dict[Code, str] = {
    "INVALID_ARG": "invalid",
    "UNAVAILABLE": "unavailable",
    "CANCELLED": "unavailable",
    "INTERNAL": "internal",
}  # as in the metrics, where nothing more is known


class Failure(Exception):
    """How a request ends without a result.

    INVALID_ARG: the caller's fault, the message names the field. UNAVAILABLE: try again, here or elsewhere.
    CANCELLED: the client is gone. INTERNAL: our fault. `reason` is that of the metrics.
    """

    def __init__(self, code: Code, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or REASONS[code]
        if len(message) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            left_out = len(message) - 2 * half
            message = f"{message[:half]} [... {left_out} characters left out ...] {message[-half:]}"
        self.message = message.encode(errors="backslashreplace").decode()  # it may quote a client's lone surrogates


def overdue(reason: FinishReason, after_us: int) -> Failure:
    """What a client is told whose time is over: that to be done (DEADLINE), or that to begin (QUEUE_TIMEOUT)."""
    what = "timeout: not done" if reason is FinishReason.DEADLINE else "queue_timeout: still waiting"
    return Failure("UNAVAILABLE", f"{what} {after_us} us after the request came", str(reason))


def without_words(error: Exception) -> str:
    """An error for the log: what it is and where it came up, innermost first. Its own words may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    places = [f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in frames]
    return " < ".join([type(error).__name__, *places])
