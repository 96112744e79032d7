"""Tokenizers of the tests of text: every shape, and a plain one."""

from __future__ import annotations

import pytest

from benchmarks.models.tiny_tokenizers import SHAPES, llama3
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=SHAPES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(SHAPES[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(llama3(tmp_path_factory.mktemp("plain")))
