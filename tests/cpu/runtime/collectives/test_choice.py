"""open_collectives: the size of the buffers that peers exchange rows through, beside what the kernels ask for."""

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
from nanoflow_backend.runtime.collectives import choice
from nanoflow_backend.runtime.collectives.choice import buffer_bytes, open_collectives

CONFIG = EngineConfig(model=str(DEMO_MODEL), device="cuda", dense_batch_tokens=700, max_running=300)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_hold_every_exchange_of_a_step_and_little_more(
    ranks: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LEAST_BYTES", 0)
    config = replace(CONFIG, tensor_parallel=ranks, dtype=dtype).settle("cuda")
    settled = Settled(config, replace(read_model_config(DEMO_MODEL), num_heads=8))
    found = buffer_bytes(settled)
    model = build(settled.model_config, ranks)
    needed = []
    for graph, tokens in ((model.layer, 700), (model.head, 300)):
        for operation in graph.operations:
            if operation.resource is Resource.NETWORK:
                value = graph.values[operation.inputs[0]]
                like = torch.empty(0, dtype=getattr(torch, config.precision.dtype(value.dtype)))
                gathers = operation.kernel == "all_gather_columns"
                regions, rows = (1, tokens) if gathers else (ranks + 1, -(-tokens // ranks))
                check_room(operation.name, SimpleNamespace(buffer_bytes=found), like, regions, rows, value.width)
                needed.append(2 * regions * rows * value.width * like.element_size())
    assert len(needed) == 3
    assert found < 1.1 * max(needed)


def test_what_was_left_open_is_no_choice() -> None:
    settled = Settled(CONFIG.settle("cuda"), read_model_config(DEMO_MODEL))
    with pytest.raises(ValueError, match="expected what a device has, got auto"):
        open_collectives(settled, "lo")
