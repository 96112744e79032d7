"""Whether an export of perf_analyzer is whole: JSON, with the requests that it was to send or more.

    python perf_analyzer_configs/whole.py results/chat/exports/concurrency_8.json 160

Exits with 1 and says what is missing where it is not. No import beyond the standard library: `sweep.sh` asks after
each experiment, beside the load.
"""

import json
import sys
from pathlib import Path


def check(export: Path, requests: int) -> None:
    """Raises: ValueError when the export is cut off, or short of requests."""
    try:
        found = sum(len(experiment["requests"]) for experiment in json.loads(export.read_text())["experiments"])
    except ValueError as error:
        raise ValueError(f"{export}: expected JSON: {error}") from None
    except (KeyError, TypeError):
        raise ValueError(f"{export}: expected experiments, each with its requests") from None
    if found < requests:
        raise ValueError(f"{export}: expected {requests} requests, found {found}")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]), int(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
