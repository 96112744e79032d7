"""InternalError says that nobody's request is to blame, but this one cannot go on."""

from __future__ import annotations

import logging
import secrets
import traceback

from nanoflow_backend.request.invalid_request import InvalidRequest

log = logging.getLogger(__name__)
INTERRUPTIONS = (KeyboardInterrupt, SystemExit)


class InternalError(RuntimeError):
    """One request failed unexpectedly. The message has an id, under which the log says what failed and where.

    Texts of unexpected errors may quote the request, so neither the message nor the log repeats them.
    """

    @classmethod
    def of(cls, error: BaseException, doing: str) -> InternalError:
        """Log an unexpected error under a new id.

        Args:
            error: what a library raised; an interruption of this process is raised again, for it is none.
            doing: what was tried, in words of our own: "compiling a grammar".
        """
        if isinstance(error, INTERRUPTIONS):
            raise error
        error_id = secrets.token_hex(4)
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        log.error("error %s: %s failed with %s at %s", error_id, doing, type(error).__name__, " < ".join(places[::-1]))
        return cls(f"internal error {error_id} while {doing}: the engine's log says more under this id")


RequestError = InvalidRequest | InternalError  # why one request has no result, while others go on
