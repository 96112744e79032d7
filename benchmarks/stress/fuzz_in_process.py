"""The request surface is fuzzed without a server: the model beside a stand-in for its stub, on a real engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import checkpoints, tiny_tokenizers
from benchmarks.stress.request_surface import FuzzRequest
from benchmarks.stress.stub_backend import ServerRequest, model_module
from nanoflow_backend.text.tokenizer import Tokenizer

PATIENCE_S = 60.0
SETTINGS = {"max_model_tokens": 48, "max_running": 32, "dense_batch_tokens": 64, "kv_cache_tokens": 4096}
CANARY = {"text_input": np.array([b"the quick brown fox"], np.object_)}
CANARY_PARAMETERS = '{"temperature": 0, "max_tokens": 8, "ignore_eos": true}'


def tiny_checkpoint(folder: Path) -> Path:
    """Random weights and a tokenizer of their vocabulary."""
    tiny_tokenizers.llama3(folder)
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size, max_position_embeddings=256), folder)


@contextmanager
def ready_model(folder: Path) -> Iterator[Any]:
    """A TritonPythonModel that is ready, with an engine process of its own."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (folder / "1").mkdir()
    (folder / "1" / "engine.json").write_text(json.dumps({"model": str(tiny_checkpoint(checkpoint)), **SETTINGS}))
    with model_module() as module:
        served = module.TritonPythonModel()
        served.initialize(
            {
                "model_config": json.dumps({"model_transaction_policy": {"decoupled": True}}),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": "fuzzed",
                "model_instance_name": "fuzzed_0_0",
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
        try:
            yield served
        finally:
            served.finalize()


def check(served: Any, batch: Sequence[FuzzRequest]) -> Counter[str]:
    """Send requests at once; returns how many ended how.

    Raises:
        AssertionError: one has no final response, or an error that is not its caller's, or disturbed the next one.
    """
    sent = [server_request(case) for case in batch]
    served.execute(sent)
    ends: Counter[str] = Counter()
    for case, request in zip(batch, sent, strict=True):
        assert request.sender.final.wait(PATIENCE_S), f"no final response to {case}"
        ends[check_end(case, request.sender.responses[-1].error)] += 1
    assert canary(served) == canary(served), "a request of before disturbed one of after"
    return ends


def check_end(case: FuzzRequest, error: Any) -> str:
    if error is None:
        return "answered"
    assert error.code != "INTERNAL", f"{error.message}: {case}"
    assert "engine" not in error.message, f"{error.message}: {case}"
    assert error.message.strip(), f"an empty message: {case}"
    return error.code


def canary(served: Any) -> bytes:
    request = ServerRequest(CANARY_PARAMETERS, **CANARY)
    served.execute([request])
    response = request.result()
    assert response.error is None, response.error.message
    return response.outputs["text_output"][0]


def server_request(case: FuzzRequest) -> ServerRequest:
    request = ServerRequest(json.dumps(case.parameters), case.timeout_us, **case.tensors)
    if case.outputs:
        request.requested_output_names = lambda: case.outputs
    return request
