"""The request surface is fuzzed: whatever a client sends, the server neither crashes nor hangs nor answers INTERNAL.

In process: the model beside a stand-in for the stub's module, on a real engine. Over gRPC and HTTP: the real server.
The first request that breaks something is in the result, shrunk. A seed gives the same requests again.
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

import typer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.stress import fuzz_in_process, fuzz_on_the_wire
from benchmarks.stress.request_surface import HINTS, cases
from nanoflow_backend.bench import result
from nanoflow_backend.request.sampling_params import NEUTRAL_VALUES
from nanoflow_backend.serving.tensors import INPUTS

BATCH = 8  # requests at once: others are there to be disturbed


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    in_process: Annotated[int, typer.Option(help="Requests to the model in this process.")] = 15_000,
    over_grpc: Annotated[int, typer.Option(help="Requests through the real server.")] = 4_000,
    over_http: Annotated[int, typer.Option(help="Requests through the real server.")] = 1_500,
    first_seed: Annotated[int, typer.Option("--seed")] = 1,
) -> None:
    """Whether any request can break the server, or be answered INTERNAL; exits with 1 if one can."""
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        model = stack.enter_context(fuzz_in_process.ready_model(folders[0]))
        wire = stack.enter_context(fuzz_on_the_wire.fuzzed_server(folders[1]))
        layers = {
            "in_process": fuzz_layer(functools.partial(fuzz_in_process.check, model), cases(), in_process, first_seed),
            "over_grpc": fuzz_layer(wire.check_grpc, fuzz_on_the_wire.messages(), over_grpc, first_seed),
            "over_http": fuzz_layer(wire.check_http, fuzz_on_the_wire.bodies(), over_http, first_seed),
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


def fuzz_layer(
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
