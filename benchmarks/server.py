"""This starts the real tritonserver with the project's model folder on a given model, for all benchmarks of serving."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanoflow_backend.embedded.server import EmbeddedServer

ROOT = Path(__file__).parents[1]
DROP_IN_FOLDER = ROOT / "model_repository" / "nanoflow"
DEMO_MODEL = ROOT / "demo" / "tiny-llama"


@contextmanager
def serve_model(
    model: Path,
    *,
    arguments: Sequence[str] = (),
    log: Path | None = None,
    ready_timeout_s: float = 120.0,
    **settings: Any,
) -> Iterator[EmbeddedServer]:
    """A ready server of `model` under the name "nanoflow", with a model repository of its own.

    Args:
        model: a Hugging Face folder.
        arguments: further ones of tritonserver, e.g. `["--model-control-mode=explicit"]`.
        log: the file for the server's output; by default only its end is kept, for error messages.
        ready_timeout_s: how long the model may take to load.
        settings: fields of engine.json.

    Raises:
        ServerError: the server cannot start, or the model is not ready in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        add_model(repository, model, **settings)
        with EmbeddedServer(repository, arguments=arguments, log=log, ready_timeout_s=ready_timeout_s) as server:
            yield server


def add_model(
    repository: Path, model: Path, *, name: str = "nanoflow", config: str | None = None, **settings: Any
) -> Path:
    """Put a copy of the drop-in folder for `model` into a model repository; returns the copy.

    Args:
        repository: made where it does not exist.
        model: a Hugging Face folder.
        name: of the served model.
        config: the text of config.pbtxt; by default that of the drop-in folder, with `name`.
        settings: fields of engine.json.
    """
    folder = repository / name
    shutil.copytree(DROP_IN_FOLDER, folder)
    named = (DROP_IN_FOLDER / "config.pbtxt").read_text().replace('name: "nanoflow"', f'name: "{name}"')
    (folder / "config.pbtxt").write_text(named if config is None else config)
    write_engine_json(folder, model, **settings)
    return folder


def write_engine_json(folder: Path, model: Path, **settings: Any) -> None:
    """Write the engine.json of a model folder; a loaded model takes it up when it is loaded again."""
    (folder / "1" / "engine.json").write_text(json.dumps({"model": str(model.resolve()), **settings}))
