"""Batch sizes that are worth a plan are B_dense of a workload and its neighbours; batches are cut at whole tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.model import CostModel, ModelSize
from nanoflow_search.cost.workload import MeanWorkload, Mix

TILE = 128  # tokens: the rows of a GEMM's tile
CHUNKS = 6  # the least number of chunks of a batch, where they are whole tiles
NEIGHBOURS = (0.75, 1.0, 1.5)  # factors of the natural size
STEP, LEAST, MOST = 256, 512, 4096  # tokens: grain, least and most of the sizes that are chosen unasked


def natural_tokens(model: ModelSize, device_name: str, gpus: int, workload: MeanWorkload) -> float:
    """Return B_dense in steady state: the KV cache is full and arrivals match completions.

    The result is infinite where `device_name` is not in the device table, since its memory is not known.

    Raises:
        ValueError: the model does not fit in the memory.
    """
    for device in DEVICES.values():
        if device.name in device_name:
            return CostModel(model, device, gpus).dense_batch_tokens(workload)
    return math.inf


def batch_mix(workload: MeanWorkload, tokens: int, natural: float) -> Mix:
    """Return the steady mix of a batch of `tokens`.

    The KV cache bounds how many tokens decode: a batch larger than the `natural` one has more tokens of prompts only.
    """
    full = workload.steady_mix(min(tokens, natural))
    decodes = round(full.decode_tokens)
    return Mix(decodes, tokens - decodes, full.decode_context, full.prefill_context)


def suitable_sizes(naturals: Sequence[float]) -> tuple[int, ...]:
    """Return the natural sizes and their neighbours, ascending.

    Raises:
        SearchError: a natural size is not known.
    """
    if math.inf in naturals:
        raise SearchError("dense-batch-tokens: say one; the device is not in devices.py, nor is its memory known")
    around = (round(natural * part / STEP) * STEP for natural in naturals for part in NEIGHBOURS)
    return tuple(sorted({min(max(tokens, LEAST), MOST) for tokens in around}))


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes that were asked for, ascending and each once.

    Raises:
        SearchError: a batch cannot be cut into whole tiles.
    """
    for tokens in sizes:
        if tokens % TILE or tokens < 2 * TILE:
            raise SearchError(f"dense-batch-tokens: expected a multiple of {TILE} from {2 * TILE} on, got {tokens}")
    return tuple(sorted(set(sizes)))


def chunk_tokens(tokens: int) -> int:
    """Return the tokens of a chunk: plans cut a batch at multiples of it.

    It is the largest number of whole tiles that divides the batch into CHUNKS or more chunks; else one tile.
    """
    fitting = [chunk for chunk in range(TILE, tokens // CHUNKS + 1, TILE) if tokens % chunk == 0]
    return max(fitting, default=TILE)
