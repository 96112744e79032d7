"""Content hashes: what they depend on, and what not."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from hashlib import blake2b

from nanoflow_backend.kvcache.content_hash import extend_hashes, reusable_pages


def hashes(token_ids: list[int], page_tokens: int = 2) -> list[bytes]:
    made: list[bytes] = []
    extend_hashes(made, array("i", token_ids), len(token_ids) // page_tokens, page_tokens)
    return made


def test_a_hash_is_of_all_tokens_up_to_the_pages_end() -> None:
    assert hashes([1, 1, 7, 7])[0] == hashes([1, 1, 8, 8])[0]
    assert hashes([1, 1, 7, 7])[1] != hashes([2, 2, 7, 7])[1] != hashes([7, 7])[0]
    assert len(set(hashes([3, 3, 3, 3, 3, 3]))) == 3


def test_ids_are_hashed_whole() -> None:
    assert hashes([1, 256]) != hashes([257, 0])
    assert hashes([1, 256]) != hashes([1, 0])


def test_a_hash_is_blake2b_of_the_one_before_and_four_bytes_an_id() -> None:
    first = blake2b(bytes([1, 0, 0, 0, 0, 1, 0, 0]), digest_size=32).digest()
    second = blake2b(first + bytes([2, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F]), digest_size=32).digest()
    assert hashes([1, 256, 2, 2**31 - 1]) == [first, second]


def test_hashes_do_not_depend_on_the_process() -> None:
    code = (
        "from array import array; from nanoflow_backend.kvcache.content_hash import extend_hashes\n"
        "made = []; extend_hashes(made, array('i', range(12)), 3, 4); print(b''.join(made).hex())"
    )
    for seed in ("1", "2"):
        printed = subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed})
        assert printed.decode().strip() == b"".join(hashes(list(range(12)), 4)).hex()


def test_hashes_are_computed_once() -> None:
    made = hashes([1, 2, 3, 4])
    before = list(made)
    extend_hashes(made, array("i", [0, 0, 0, 0, 5, 6]), 3, 2)  # what is there is not looked at again
    assert made[:2] == before
    assert len(set(made)) == 3


def test_the_last_token_is_always_computed() -> None:
    assert [reusable_pages(tokens, 2) for tokens in range(1, 7)] == [0, 0, 1, 1, 2, 2]
