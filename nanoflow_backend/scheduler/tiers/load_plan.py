"""A LoadPlan brings pages of one sequence from lower tiers while the sequence computes others: until both meet."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class LoadPlan:
    """Pages first .. end - 1 of a sequence, whose contents some tier below the device holds.

        computed, or about to be    nobody's yet      on their way, or loaded    not known to any tier
        first ............... front ........... back ....................... end ....................

    The sequence computes from the front, loads are issued from the back. When front and back have met and nothing is
    on its way any more, the sequence goes on behind the end. A load that fails becomes the new end.
    """

    first: int
    contents: list[bytes]
    pages: list[int]  # of the device, where they are to go
    parent: bytes | None = None  # content of the page before the first
    progress_s: float = 0.0  # when it was made, or the last of its pages came
    front: int = field(init=False)
    back: int = field(init=False)
    end: int = field(init=False)
    outstanding: set[int] = field(default_factory=set)  # indices on their way
    disk_pages: int = 0  # of all these, those that would have to come from the disk
    read: set[int] = field(default_factory=set)  # indices of those that did

    def __post_init__(self) -> None:
        self.front = self.first
        self.back = self.end = self.first + len(self.contents)

    @property
    def unissued(self) -> int:
        """Pages that are still to be computed or loaded, whichever comes first."""
        return self.back - self.front

    @property
    def met(self) -> bool:
        """Everything before the end is computed, about to be, or loaded."""
        return self.front == self.back and not self.outstanding

    @property
    def read_pages(self) -> int:
        """Of the pages that were loaded and are of use, those from the disk."""
        return sum(self.back <= index < self.end for index in self.read)

    def content(self, index: int) -> bytes:
        return self.contents[index - self.first]

    def content_before(self, index: int) -> bytes | None:
        return self.parent if index == self.first else self.content(index - 1)

    def page(self, index: int) -> int:
        return self.pages[index - self.first]

    def claim(self, front: int) -> None:
        """Pages below `front` are computed from now on."""
        assert front <= self.back, "a page is computed while it is loaded"
        self.front = max(self.front, front)

    def take(self) -> int:
        """The index of the page that is loaded next."""
        assert self.front < self.back, "nothing is left to load"
        self.back -= 1
        self.outstanding.add(self.back)
        return self.back

    def arrived(self, index: int) -> None:
        self.outstanding.remove(index)

    def failed(self, index: int) -> None:
        """It will not come: it is computed, and what follows it, too."""
        self.outstanding.remove(index)
        self.end = min(self.end, index)

    def give_up(self) -> None:
        """Load nothing further: what is loaded already, and does not follow what is there, is lost."""
        if self.unissued:
            self.end = self.back = self.front
