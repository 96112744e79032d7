"""Sizes: which batches are worth a plan: B_dense that a workload fills, and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.model import CostModel, ModelSize, Workload
from nanoflow_search.cost.work import Mix

TILE = 128  # tokens: rows of a GEMM's tile
CHUNKS = 6  # a batch is cut at least into so many, if they are whole tiles
NEIGHBOURS = (0.75, 1.0, 1.5)  # of the natural size
STEP, LEAST, MOST = 256, 512, 4096  # tokens: sizes that are looked at without being asked for


def natural_tokens(model: ModelSize, device_name: str, gpus: int, workload: Workload) -> float:
    """Of a batch where a full KV cache decodes, and prompts come as fast as requests end. inf: the memory is unknown.

    Raises:
        ValueError: the model does not fit.
    """
    for device in DEVICES.values():
        if device.name in device_name:
            return CostModel(model, device, gpus).dense_batch_tokens(workload)
    return math.inf


def mix_of(workload: Workload, tokens: int, natural: float) -> Mix:
    """Of a batch of `tokens`. No more of them decode than in the natural one: what a larger batch has are prompts."""
    full = workload.steady_mix(min(tokens, natural))
    decodes = round(full.decode_tokens)
    return Mix(decodes, tokens - decodes, full.decode_context, full.prefill_context)


def suitable(naturals: Sequence[float]) -> tuple[int, ...]:
    """The natural sizes and their neighbours, ascending. Raises: SearchError, a natural size is not known."""
    if math.inf in naturals:
        raise SearchError("dense-batch-tokens: say one; the device is not in devices.py, nor is its memory known")
    around = (round(natural * part / STEP) * STEP for natural in naturals for part in NEIGHBOURS)
    return tuple(sorted({min(max(tokens, LEAST), MOST) for tokens in around}))


def checked(sizes: Sequence[int]) -> tuple[int, ...]:
    """Ascending. Raises: SearchError, a batch that cannot be cut at whole tiles."""
    for tokens in sizes:
        if tokens % TILE or tokens < 2 * TILE:
            raise SearchError(f"dense-batch-tokens: expected a multiple of {TILE} from {2 * TILE} on, got {tokens}")
    return tuple(sorted(set(sizes)))


def chunk_tokens(tokens: int) -> int:
    """The largest chunk of whole tiles that cuts a batch into CHUNKS or more; else a tile. Plans cut there."""
    fitting = [chunk for chunk in range(TILE, tokens // CHUNKS + 1, TILE) if tokens % chunk == 0]
    return max(fitting, default=TILE)
