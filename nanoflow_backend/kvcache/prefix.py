"""PrefixIndex finds the pages of the device that hold the K and V of given tokens."""

from __future__ import annotations


class PrefixIndex:
    """Full pages by their content hash (see content_hash). The index only names pages; the pool owns them."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._contents: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def lookup(self, content: bytes) -> int | None:
        """The page that holds this content; None if there is none."""
        return self._pages.get(content)

    def publish(self, content: bytes, page: int) -> bool:
        """Name `page` as the holder of this content; False if another page already is.

        The step that fills the page must have been launched: a reader in the same step would be too early.
        """
        if content in self._pages:
            return self._pages[content] == page
        self._pages[content] = page
        self._contents[page] = content
        return True

    def forget(self, page: int) -> bytes:
        """The page is about to get other content. Returns what it holds until then."""
        content = self._contents.pop(page)
        del self._pages[content]
        return content

    def holds(self, page: int) -> bool:
        """Whether others can find this page."""
        return page in self._contents

    def check(self) -> None:
        """Raise AssertionError if names and pages are not one to one."""
        assert {page: name for name, page in self._pages.items()} == self._contents, "contents and pages disagree"
        assert len(self._pages) == len(self._contents), "a page has two names"
