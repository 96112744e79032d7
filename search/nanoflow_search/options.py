"""What some options of the commands may be."""

from __future__ import annotations

from enum import StrEnum


class InDtype(StrEnum):
    """What the engine keeps weights, activations and KV pages in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Quantised(StrEnum):
    """What the engine quantises a model to that is not quantised."""

    FP8 = "fp8"


class KvDtype(StrEnum):
    """What the engine keeps KV pages in; auto: as the dtype, or FP8 where the checkpoint has scales for it."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FP8_E4M3 = "fp8_e4m3"


class On(StrEnum):
    """Where a search measures."""

    AUTO = "auto"
    SYNTHETIC = "synthetic"
