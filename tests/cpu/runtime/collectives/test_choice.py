"""open_collectives: what is chosen, and the size of the buffers that peers exchange rows through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels.collectives.tiles import check_room
from support.places import DEMO_MODEL

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives.choice import open_collectives
from nanoflow_backend.runtime.collectives.mapped_peers import step_bytes

CONFIG = EngineConfig(model=str(DEMO_MODEL), device="cuda", dense_batch_tokens=7000, max_running=3000)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_hold_every_exchange_of_a_step_and_little_more(ranks: int, dtype: str) -> None:
    """Also of a form in which each rank has its part of the MLP's rows gathered."""
    config = replace(CONFIG, tensor_parallel=ranks, dtype=dtype).settle("cuda")
    settled = Settled(config, replace(read_model_config(DEMO_MODEL), num_heads=8))
    found = step_bytes(settled)
    model, needed = build(settled.model_config, ranks), []

    def check(regions: int, rows: int, width: int, dtype: str) -> None:
        like = torch.empty(0, dtype=getattr(torch, config.precision.dtype(dtype)))
        check_room("exchange", SimpleNamespace(buffer_bytes=found), like, regions, rows, width)
        needed.append(2 * regions * rows * width * like.element_size())

    for graph, tokens in ((model.layer, 7000), (model.head, 3000)):
        for operation in graph.operations:
            if operation.resource is not Resource.NETWORK:
                continue
            value = graph.values[operation.inputs[0]]
            if operation.kernel == "all_gather_columns":
                check(1, tokens, value.width, value.dtype)
            else:
                check(ranks + 1, -(-tokens // ranks), value.width, value.dtype)
                check(ranks + 1, tokens, -(-value.width // ranks), value.dtype)
    check(1, 7000, settled.model_config.intermediate_size // ranks, "activations")
    assert len(needed) == 6
    assert found < 1.6 * max(needed), "the widest value is that of two products at once"


def test_what_was_left_open_is_no_choice() -> None:
    settled = Settled(CONFIG.settle("cuda"), read_model_config(DEMO_MODEL))
    with pytest.raises(ValueError, match="expected what a device has, got auto"):
        open_collectives(settled, "lo")
