"""process_tree looks at processes through /proc: the children of one, and whether one is alive."""

import contextlib
from pathlib import Path


def children(pid: int) -> list[int]:
    """Of all its threads: the one that starts a process is its parent."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads end while we look
            found += map(int, (task / "children").read_text().split())
    return found


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
