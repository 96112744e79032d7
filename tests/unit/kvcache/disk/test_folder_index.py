"""What a folder holds is told as it changes."""

from __future__ import annotations

import random
import threading

from nanoflow_backend.kvcache.disk.folder_index import FolderIndex


def test_who_watches_is_told_what_there_is_and_of_every_change_once() -> None:
    index, told = FolderIndex(), []
    index.add(b"a", "A")
    index.watch(lambda found, gone: told.append((found, gone)))
    index.add(b"b", "B")
    assert index.discard(b"a") == "A"
    assert index.discard(b"a") is None
    index.replace({b"b": "B2", b"c": "C"})
    index.replace({b"b": "B2", b"c": "C"})
    assert told == [([b"a"], []), ([b"b"], []), ([], [b"a"]), ([b"c"], [])]
    assert dict(index) == {b"b": "B2", b"c": "C"}


def test_what_is_told_is_what_there_is_whoever_changes_it() -> None:
    index, known = FolderIndex(), set[bytes]()

    def tell(found: list[bytes], gone: list[bytes]) -> None:
        known.update(found)
        known.difference_update(gone)

    def change(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            contents = [bytes([rng.randrange(20)]) for _ in range(rng.randint(1, 5))]
            match rng.randrange(3):
                case 0:
                    index.add(contents[0], "name")
                case 1:
                    index.discard(contents[0])
                case 2:
                    index.replace(dict.fromkeys(contents, "name"))

    index.watch(tell)
    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known == set(index)
