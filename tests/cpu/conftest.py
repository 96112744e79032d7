"""Kernels run in the kernel language's interpreter where there is no device; and the model that most modules share."""

import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer of its own, unless a module has another model."""
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """24 seeded prompts of 1 to 60 ids of bytes."""
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(24)]
