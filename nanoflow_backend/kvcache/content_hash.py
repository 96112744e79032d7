"""Content hashes name what a page holds, so that equal prefixes are computed once and found in any tier.

A hash depends on token ids and page size alone: it is the same in every process and on every host, so pages may outlive
the process that computed them.
"""

from __future__ import annotations

import sys
from array import array
from hashlib import blake2b

HASH_BYTES = 32  # prompts come from strangers: a collision would show one client another's context


def extend_hashes(hashes: list[bytes], token_ids: array[int], pages: int, page_tokens: int) -> None:
    """Append to `hashes`, those of the leading pages of `token_ids`, until there are `pages` of them.

    K and V of a page depend on every token up to its end, and so does its hash: blake2b of the hash of the page before
    and the page's own ids, each 4 bytes with the lowest first. token_ids: C ints of 4 bytes.
    """
    for index in range(len(hashes), pages):
        own = token_ids[index * page_tokens : (index + 1) * page_tokens]
        if sys.byteorder == "big":
            own.byteswap()
        before = hashes[-1] if hashes else b""
        hashes.append(blake2b(before + own.tobytes(), digest_size=HASH_BYTES).digest())


def reusable_pages(tokens: int, page_tokens: int) -> int:
    """Leading pages that need not be computed if they are known: the last token has to be, to be sampled from."""
    return (tokens - 1) // page_tokens
