"""This package runs a model: LLM completes prompts in Python, Engine is the loop under it, which the server drives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoflow_backend.engine.completion import Completion
    from nanoflow_backend.engine.engine import Engine
    from nanoflow_backend.engine.llm import LLM
    from nanoflow_backend.request.sampling_params import SamplingParams

__all__ = ["LLM", "Completion", "Engine", "SamplingParams"]
MODULES = {
    "LLM": "nanoflow_backend.engine.llm",
    "Completion": "nanoflow_backend.engine.completion",
    "Engine": "nanoflow_backend.engine.engine",
    "SamplingParams": "nanoflow_backend.request.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the server's stub imports this package too, and must stay free of torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
