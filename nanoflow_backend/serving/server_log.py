"""ServerLog puts our log lines into the server's own log, which adds time and level."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils

from nanoflow_backend.process.logs import labelled


class ServerLog(logging.Handler):
    """A logging handler that writes to the log of the server."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(labelled(record))
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(labelled(record))
        else:
            pb_utils.Logger.log_info(labelled(record))
