"""Fuzz of the request surface: whatever a client sends, never a crash, a hang or INTERNAL for its own fault.

    PYTHONPATH=.:kernels:tests:tests/support python -P benchmarks/fuzz.py --output benchmarks/results/fuzz.json

In process: the model beside a stand-in for the stub's module, on a real engine. Over gRPC and HTTP: the real server.
Exits with 1 if a request broke something; it is in the result, shrunk. A seed gives the same requests again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import request_fuzz
import typer
import wire_fuzz
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from request_surface import HINTS, cases

from nanoflow_backend.bench import result
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.request.sampling_params import NEUTRAL_VALUES
from nanoflow_backend.serving.tensors import INPUTS

BATCH = 8  # requests at once: others are there to be disturbed


def main(
    output: Annotated[Path | None, typer.Option()] = None,
    in_process: int = 15_000,
    over_grpc: int = 4_000,
    over_http: int = 1_500,
    first_seed: int = 1,
) -> None:
    with contextlib.ExitStack() as stack:
        folder = functools.partial(lambda: Path(stack.enter_context(tempfile.TemporaryDirectory())))
        model = stack.enter_context(request_fuzz.model(folder()))

        def server(repository: Path, **options: Any) -> EmbeddedServer:
            return stack.enter_context(EmbeddedServer(repository, **options))

        wire = stack.enter_context(contextlib.closing(wire_fuzz.start(folder(), server)))
        layers = {
            "in_process": run(functools.partial(request_fuzz.check, model), cases(), in_process, first_seed),
            "over_grpc": run(wire.check_grpc, wire_fuzz.messages(), over_grpc, first_seed),
            "over_http": run(wire.check_http, wire_fuzz.bodies(), over_http, first_seed),
        }
    failures = [layer["failure"] for layer in layers.values() if layer["failure"]]
    result.write(
        {
            "seed": first_seed,
            "input_tensors": len(INPUTS),
            "sampling_fields": len(HINTS.keys() | NEUTRAL_VALUES.keys()),
            "cases": sum(layer["cases"] for layer in layers.values()),
            "failure": "; ".join(failures) or None,
            **layers,
        },
        output,
    )
    sys.exit(bool(failures))


def run(
    check: Callable[[Any], Counter[str]], requests: st.SearchStrategy[Any], count: int, first_seed: int
) -> dict[str, Any]:
    """`count` requests in batches, checked; the first that fails ends it, shrunk by hypothesis."""
    ends: Counter[str] = Counter()
    start_s = time.monotonic()

    @seed(first_seed)
    @settings(max_examples=-(-count // BATCH), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(batch=st.lists(requests, min_size=BATCH, max_size=BATCH))
    def checked(batch: list[Any]) -> None:
        try:
            ends.update(check(batch))
        except Exception as error:  # at once: to shrink it may take hypothesis five minutes
            print(f"{type(error).__name__}: {error}"[:2000], flush=True)
            raise
        if ends.total() % (100 * BATCH) == 0:
            print(f"{ends.total()} of {count}: {dict(ends)}", flush=True)

    failure = None
    try:
        checked()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - start_s)
    return {"cases": ends.total(), "seconds": seconds, "ends": dict(sorted(ends.items())), "failure": failure}


if __name__ == "__main__":
    typer.run(main)
