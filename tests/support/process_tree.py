"""process_tree looks at processes through /proc: the children of one, and whether one is alive."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Of all its threads: the one that starts a process is its parent."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
