"""Settled is a configuration with everything decided that it left open, and the model that it names."""

from __future__ import annotations

import msgspec

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.model_config import ModelConfig


class Settled(msgspec.Struct, frozen=True):
    """What every rank of an engine gets; on another host, with that host's folder of the model.

    Only `config.kv_cache_tokens` may still be None: the worker measures what memory is left for the KV cache of a GPU.
    """

    config: SettledConfig
    model_config: ModelConfig

    @property
    def max_model_tokens(self) -> int:
        """Prompt and output of one request."""
        return self.model_config.max_model_tokens
