"""MadeWith: what tells one model, or one setting, from another."""

import random

import pytest
from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.model_folder import SPAN_BYTES, SPANS, file_digest
from nanoflow_backend.offline.made_with import MadeWith


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    weights = random.Random(0).randbytes(3 * SPANS * SPAN_BYTES)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(weights)
    return tmp_path


def made_with(folder, **settings):
    return MadeWith.of(EngineConfig(model=str(folder), **settings).settle("cpu"))


def test_a_copy_in_another_folder_with_other_speeds_is_the_same(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("others'")
    now = made_with(copy, dense_batch_tokens=64, kv_cache_tokens=1024, dtype="float32")  # which auto is on a CPU
    assert now.changes_from(made_with(folder)) == []


def test_every_change_is_named(folder):
    before = made_with(folder)
    (folder / "config.json").write_text("{ }")
    (folder / "tokenizer.json").unlink()
    now = made_with(folder, dtype="bfloat16", seed=3)
    assert now.changes_from(before) == [
        "dtype was 'float32', is 'bfloat16'",
        "kv_cache_dtype was 'float32', is 'bfloat16'",  # as dtype, where it is not said
        "seed was 0, is 3",
        "the model's config.json has changed",
        "the model's tokenizer.json has changed",
    ]


def test_trained_weights_of_the_same_size_are_seen(folder):
    before, path = made_with(folder), folder / "model-2.safetensors"
    trained = bytes(byte ^ 1 if byte % 7 == 0 else byte for byte in path.read_bytes())  # one weight in seven
    path.write_bytes(trained)
    assert made_with(folder).changes_from(before) == ["the model's model-2.safetensors has changed"]


def test_the_first_and_the_last_byte_count_whatever_the_size(tmp_path):
    path = tmp_path / "file"
    for size in (1, SPAN_BYTES, SPANS * SPAN_BYTES, SPANS * SPAN_BYTES + 1, 5 * SPANS * SPAN_BYTES):
        seen = set()
        for place in (None, 0, size - 1):
            content = bytearray(size)
            if place is not None:
                content[place] = 1
            path.write_bytes(content)
            seen.add(file_digest(path))
        assert len(seen) == (2 if size == 1 else 3)


def test_it_is_read_back_as_it_was_written(folder):
    import msgspec

    before = made_with(folder)
    assert msgspec.json.decode(msgspec.json.encode(before), type=MadeWith) == before
    assert replace(before, settings={}).changes_from(before) != []
