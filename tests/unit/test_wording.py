"""What is written says how to use software, and what we do where it breaks: never how to break it."""

from __future__ import annotations

import re
import subprocess

from support.places import ROOT

WRITTEN = ("*.md", "*.py", "*.sh", "*.yml", "*.yaml", "Makefile")
ENDINGS = re.compile(r"\b(crash\w*|segfault\w*|SIGSEGV|SIGABRT|hangs?|hung|takes harm)\b", re.IGNORECASE)
OURS = {"tests/unit/test_wording.py", "tests/unit/process/test_supervisor.py"}  # our own engine's start, simulated


def test_no_text_tells_how_other_software_ends() -> None:
    listed = subprocess.run(["git", "ls-files", *WRITTEN], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.splitlines() if name not in OURS]
    assert "examples/README.md" in files
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        if ENDINGS.search(line)
    ]
    assert not found, "\n".join(found)
