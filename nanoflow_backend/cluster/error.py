"""ClusterError says why a batch on a cluster cannot go on."""

from __future__ import annotations

import re

OUR_OWN = re.compile(r"nanoflow_backend\.[\w.]+: (.*)")


class ClusterError(RuntimeError):
    """What is finished stays; the same command goes on from there."""

    @classmethod
    def of(cls, error: BaseException) -> ClusterError:
        """In one line. Ray has the text of what an actor or a task raised, with its traceback, and no more of it."""
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        own = OUR_OWN.fullmatch(last.strip())
        return cls(own[1] if own else f"the cluster gave up: {last.strip()}")
