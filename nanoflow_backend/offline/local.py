"""LocalRunner: runs jobs on one engine of this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nanoflow_backend.config import EngineConfig, ModelConfig, SettledConfig
from nanoflow_backend.engine.completion import Completion, Job
from nanoflow_backend.engine.engine import Engine
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.runtime.device import find_kind
from nanoflow_backend.text.tokenizer import Tokenizer


class LocalRunner:
    """A Runner. Making it loads the model; `close` ends the ranks, if there are several."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | InvalidRequest]]:
        return self._engine.complete(jobs)

    def close(self) -> None:
        self._engine.close()


def settled_here(config: EngineConfig) -> SettledConfig:
    """`config` as an engine of this machine will have it, found without making one.

    Raises:
        ConfigError: what can be seen to be wrong with it, or with the model's config.json.
    """
    ModelConfig.from_pretrained(Path(config.model))
    # Where GPUs are named, CUDA must not be touched before the engine has chosen among them.
    return config.settle("cuda" if config.gpus is not None else find_kind(config.device))
