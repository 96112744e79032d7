"""The engine: scheduler, worker and text joined into one loop, in this process or in another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoflow_backend.engine.completion import Completion
    from nanoflow_backend.engine.engine import Engine
    from nanoflow_backend.request.sampling_params import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import on first use: the server's stub imports this package too, and must stay free of torch."""
    if name == "Engine":
        from nanoflow_backend.engine.engine import Engine

        return Engine
    if name == "Completion":
        from nanoflow_backend.engine.completion import Completion

        return Completion
    if name == "SamplingParams":
        from nanoflow_backend.request.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
