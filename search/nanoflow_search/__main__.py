"""nanoflow-search: find the schedule of a model on a machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def search() -> None:
    """Find the schedule of a model on a machine."""


@app.command()
def analyze(
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")],
    workload: Annotated[list[str], typer.Option(help="Mean prompt/output tokens, e.g. 1024/512. Repeatable.")],
    device: Annotated[
        list[str] | None, typer.Option(help="Names of the device table; default: all. Repeatable.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    dense_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what fills the memory.")] = None,
) -> None:
    """What bounds the model's throughput: the paper's cost model (section 3), with power as a fourth resource."""
    from nanoflow_search.analyze import analyze

    analyze(model, device or [], tp, workload, dense_batch_tokens)


def main() -> None:
    """Errors that name their cause need no traceback."""
    try:
        app()
    except ValueError as error:  # ConfigError, ScheduleError and ProfileError are
        sys.exit(f"nanoflow-search: {error}")


if __name__ == "__main__":
    main()
