"""Ranks that cannot start: the engine says which, and at once."""

import threading
from pathlib import Path

import pytest
from support.process_tree import alive

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine, ranks
from nanoflow_backend.process.child import Child
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)


def test_heads_that_the_ranks_cannot_share_are_refused_before_a_rank_starts(tmp_path, monkeypatch):
    folder = checkpoints.save(checkpoints.make("llama", heads=4), tmp_path)
    monkeypatch.setattr(ranks, "Child", lambda module: 1 // 0)
    with pytest.raises(ConfigError, match="tensor_parallel: expected a divisor of num_attention_heads 4, got 8"):
        Engine.from_pretrained(folder, tensor_parallel=8)


@pytest.mark.timeout(60)
def test_a_rank_that_dies_before_it_joins_is_named_at_once(model, monkeypatch):
    """The real group would wait ten minutes for it, and this process could have no other one meanwhile."""
    started, over = [], threading.Event()
    monkeypatch.setattr(ranks, "join_group", lambda *_: over.wait(60))
    monkeypatch.setattr(ranks, "Child", lambda module: started.append(Child("nanoflow_backend.nowhere")) or started[-1])
    with pytest.raises(RuntimeError, match=r"rank 1: process \d+ ended with exit code 1"):
        Engine.from_pretrained(model, tensor_parallel=2)
    over.set()
    assert not alive(started[0].pid)
