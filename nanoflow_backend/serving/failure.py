"""Failure: an error for one client, with the code that the server's protocols know."""

from __future__ import annotations

from typing import Literal

Code = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]


class Failure(Exception):
    """How a request ends without a result.

    INVALID_ARG: the caller's fault, the message names the field. UNAVAILABLE: try again, here or elsewhere.
    CANCELLED: the client is gone. INTERNAL: our fault.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message.encode(errors="backslashreplace").decode()  # it may quote a client's lone surrogates
