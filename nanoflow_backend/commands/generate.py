"""`nanoflow generate` completes one prompt in this process and prints the text as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import LLM
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams


def generate(model: Path, prompt: str, sampling: Mapping[str, Any], settings: Sequence[str]) -> None:
    """Print one completion as it comes. Raises: InvalidRequest, naming the field."""
    params = SamplingParams.parse(sampling)
    if params.n != 1:
        raise InvalidRequest(f"n: expected 1, for one text is shown, got {params.n}")
    llm = LLM(make_engine(model, settings))
    shown = prompt  # until the engine has taken it
    for _, progress in llm.stream([(prompt, params)]):
        if isinstance(progress, RequestError):
            raise progress
        print(shown + progress.delta.text, end="", flush=True)
        shown = ""
    print()
    llm.close()
