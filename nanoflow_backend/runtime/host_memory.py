"""available_bytes says how much memory of the host may still be taken, within the limit of the container."""

from __future__ import annotations

from pathlib import Path

# Of control groups version 2 and 1, as a container sees its own: limit, use, and the part of it that is file cache.
GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """What can be allocated without swapping, or being killed by the container's limit."""
    available = 1024 * int(_table(proc / "meminfo")["MemAvailable:"])
    for limit_file, use_file, table_file, cache in GROUPS:
        limit = (group / limit_file).read_text().strip() if (group / limit_file).exists() else "max"
        if limit != "max":
            used = int((group / use_file).read_text()) - int(_table(group / table_file)[cache])
            available = min(available, int(limit) - used)
    return max(0, available)


def _table(path: Path) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in path.read_text().splitlines()}
