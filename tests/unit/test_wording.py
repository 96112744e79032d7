"""What is written says how to use software, and what we do where it breaks: never how to break it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from support.places import ROOT

WRITTEN = (".md", ".py", ".sh", ".yml", ".yaml")
MADE = ("build", "dist", "shared")  # folders that are not the project's text
ENDINGS = re.compile(r"\b(crash\w*|segfault\w*|SIGSEGV|SIGABRT|hangs?|hung|takes harm)\b", re.IGNORECASE)
OURS = {"tests/unit/test_wording.py", "tests/unit/process/test_supervisor.py"}  # our own engine's start, simulated


def texts() -> Iterator[Path]:
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in MADE]
        yield from (Path(folder, name) for name in files if name.endswith(WRITTEN))


def test_no_text_tells_how_other_software_ends() -> None:
    read = {str(path.relative_to(ROOT)): path.read_text() for path in texts()}
    assert "examples/README.md" in read
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in read.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if name not in OURS and ENDINGS.search(line)
    ]
    assert not found, "\n".join(found)
