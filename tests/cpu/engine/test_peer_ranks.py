"""An engine whose ranks exchange rows by the peer-to-peer kernels, each a process; memory of GPUs is a file here."""

import os
from pathlib import Path

import pytest
from support.engine import interpreted_peers
from triton.runtime.interpreter import interpreter_builder

from nanoflow_backend.engine import LLM, SamplingParams, ranks
from nanoflow_backend.hosts import members

GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the interpreter's own
def test_greedy_tokens_are_those_of_one_rank(model, tmp_path, monkeypatch):
    """Collectives in a lane of their own, in buffers of the size that the engine gives them."""
    options = {"dense_batch_tokens": 16, "kv_cache_tokens": 1024, "schedule": "nano-batched-2"}
    expected = LLM.from_pretrained(model, **options).generate(PROMPTS, GREEDY)
    monkeypatch.setenv(interpreted_peers.FOLDER, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    monkeypatch.setattr(members, "RANK", "support.engine.interpreted_peers")
    monkeypatch.setattr(ranks, "open_collectives", interpreted_peers.open_shared_files)
    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", interpreter_builder.create_atomic_rmw)  # put back
    made = LLM.from_pretrained(model, tensor_parallel=2, **options)
    found = made.generate(PROMPTS, GREEDY)
    made.close()
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
