"""PrefixIndex: which page holds the K and V of which tokens, so that equal prefixes are computed once."""

from __future__ import annotations

from array import array
from hashlib import blake2b

DIGEST_BYTES = 32  # prompts come from strangers: a collision would show one client another's context


class PrefixIndex:
    """Full pages by a chained digest of their content.

    K and V of a page depend on every token up to its end, and so does its digest: that of the parent page and the
    page's own ids. The index only names pages; the pool owns them.
    """

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def extend(self, digests: list[bytes], token_ids: array[int], pages: int) -> None:
        """Append to `digests`, those of the leading pages of `token_ids`, until there are `pages` of them."""
        size = self.page_tokens
        for index in range(len(digests), pages):
            parent = digests[-1] if digests else b""
            content = token_ids[index * size : (index + 1) * size].tobytes()
            digests.append(blake2b(parent + content, digest_size=DIGEST_BYTES).digest())

    def lookup(self, digests: list[bytes], token_ids: array[int]) -> list[int]:
        """The longest known run of leading pages. At least the last token is left over: it has to be computed, to
        be sampled from. `digests` is extended to the pages that were looked for.
        """
        limit = (len(token_ids) - 1) // self.page_tokens
        self.extend(digests, token_ids, limit)
        pages = []
        for digest in digests[:limit]:
            page = self._pages.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, digest: bytes, page: int) -> bool:
        """Name `page` as the holder of this content; False if another page already is.

        The step that fills the page must have been launched: a reader in the same step would be too early.
        """
        if digest in self._pages:
            return self._pages[digest] == page
        self._pages[digest] = page
        self._digests[page] = digest
        return True

    def forget(self, page: int) -> None:
        """The page is about to get other content."""
        del self._pages[self._digests.pop(page)]

    def holds(self, page: int) -> bool:
        return page in self._digests

    def check(self) -> None:
        """Raise AssertionError if names and pages are not one to one."""
        assert {page: digest for digest, page in self._pages.items()} == self._digests, "digests and pages disagree"
        assert len(self._pages) == len(self._digests), "a page has two names"
