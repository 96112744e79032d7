"""A model with a tokenizer, for commands that run one."""

from pathlib import Path

import pytest

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)
