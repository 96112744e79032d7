"""nanoflow generate: one prompt, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.scheduler.sampling_params import InvalidRequest, SamplingParams


def generate(model: Path, prompt: str, sampling: Mapping[str, Any], settings: Sequence[str]) -> None:
    params = SamplingParams.parse(sampling)
    engine = make_engine(model, settings)
    print(prompt, end="", flush=True)
    for _, progress in engine.stream([(prompt, params)]):
        if isinstance(progress, InvalidRequest):
            raise progress
        print(progress.delta.text, end="", flush=True)
    print()
    engine.close()
