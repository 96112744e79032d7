"""Files of a model changed at random; `make mutate` is the long mode."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.stress import mutated_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mutated_files.tiny_model(tmp_path_factory.mktemp("mutated"))


def test_a_changed_file_is_refused_or_works(folder: Path) -> None:
    ends = mutated_files.run(folder, count=250, first_seed=1)
    assert ends.keys() == {"works", "refused"}, "\n".join(ends)


def test_a_seed_gives_the_same_change_again(folder: Path) -> None:
    for name in mutated_files.FILES:
        content = (folder / name).read_bytes()
        one, again, other = (mutated_files.changed(content, random.Random(seed)) for seed in (3, 3, 4))
        assert one == again
        assert {one, other} != {content}


def test_what_breaks_a_start_is_said_with_its_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutated_files, "EngineConfig", None)  # as if reading engine.json had a fault
    ((end, count),) = mutated_files.run(folder, count=1, first_seed=9).items()
    assert count == 1
    assert end.startswith("broken, seed 9, ")
    assert end.endswith("AttributeError: 'NoneType' object has no attribute 'load'")
