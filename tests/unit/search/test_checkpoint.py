"""Checkpoints: what is saved is loaded again, what is broken is named, and one folder belongs to one search."""

from pathlib import Path

import msgspec
import pytest
from nanoflow_search.checkpoint import Checkpoint, Run, SearchError


class Key(msgspec.Struct, frozen=True):
    model: str
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize("name", ["part.json", "part.msgpack"])
def test_what_is_saved_is_loaded_again(tmp_path: Path, name: str) -> None:
    files = Checkpoint(tmp_path / "state")
    assert files.load(name, Key) is None
    assert files.save(name, Key("m", (1, 2))) == Key("m", (1, 2)) == files.load(name, Key)
    assert files.within("part").load(name, Key) is None
    assert [path.name for path in (tmp_path / "state").iterdir()] == [name], "nothing partial stays"


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    files = Checkpoint(tmp_path)
    files.save("part.json", [1])
    with pytest.raises(
        SearchError, match=r"part\.json: Expected `object`, got `array`; without this file that part is"
    ):
        files.load("part.json", Key)


def test_one_folder_belongs_to_one_search(tmp_path: Path) -> None:
    files = Checkpoint(tmp_path)
    assert not files.claimed
    files.claim(Key("one"))
    assert files.claimed
    files.claim(Key("one"))
    with pytest.raises(SearchError, match="another search: model is 'one' there and 'two' here; sizes is "):
        files.claim(Key("two", (1,)))


def test_without_a_folder_nothing_is_kept() -> None:
    files = Checkpoint().within("part")
    assert files.save("part.json", 1) == 1
    assert files.load("part.json", int) is None
    files.claim(Key("one"))
    files.claim(Key("two"))
    assert not files.claimed


def test_a_part_of_a_run_has_its_folder_and_its_label(tmp_path: Path) -> None:
    said: list[str] = []
    part = Run(Checkpoint(tmp_path), said.append).within("2048", label="2048 tokens").within("whole")
    part.say("done")
    assert said == ["2048 tokens: done"]
    assert part.checkpoint == Checkpoint(tmp_path / "2048" / "whole")
