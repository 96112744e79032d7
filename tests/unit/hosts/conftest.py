"""Where the hosts of a test find their secret, and their ranks are processes without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts.running import Running

from nanoflow_backend.hosts import gathering, host, members


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where ranks without torch leave what they saw, and the secret is; links and retries are quick."""
    monkeypatch.setattr(members, "RANK", "support.hosts.fake_rank")
    monkeypatch.setenv("FAKE_RANKS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    monkeypatch.setattr(host, "RETRY_S", 0.05)
    monkeypatch.setattr(gathering, "CHECK_S", 0.05)
    (tmp_path / "secret").write_text("a" * 64)
    (tmp_path / "secret").chmod(0o600)
    yield tmp_path
    for running in Running.hosts:
        running.end()
    Running.hosts.clear()
