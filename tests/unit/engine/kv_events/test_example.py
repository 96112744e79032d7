"""examples/kv_events.py follows an engine: from its beginning, over a gap, and when it starts again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from array import array
from pathlib import Path

from support.places import ROOT
from support.waiting import until

from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.engine.kv_events.publisher import KvEventPublisher
from nanoflow_backend.kvcache.page_events import Medium

COMMAND = re.search(r"^\.venv/bin/python (examples/kv_events\.py.*)$", (ROOT / "examples/README.md").read_text(), re.M)


def test_the_example_knows_what_the_engine_has(tmp_path: Path) -> None:
    events, replays = (20_000 + 25 * (os.getpid() % 400) + offset for offset in (0, 1))
    config = KvEventsConfig(endpoint=f"tcp://*:{events}", replay_endpoint=f"tcp://*:{replays}")
    assert COMMAND is not None
    command = COMMAND[1].replace(":5557", f":{events}").replace(":5558", f":{replays}").replace(" 60", " 2").split()
    said = tmp_path / "said"

    def pages(publisher: KvEventPublisher, *numbers: int) -> None:
        for number in numbers:
            publisher.pages.stored(b"%032d" % number, None, array("i", [number]), Medium.DEVICE)
        publisher.publish()

    first = KvEventPublisher(config)
    first.pages.cleared()
    pages(first, 1, 2)
    with (
        said.open("w") as file,
        subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as example,
    ):
        until(lambda: "batch 0: AllBlocksCleared BlockStored BlockStored; 2 blocks\n" in said.read_text())
        number = 0

        def heard_live() -> bool:  # its subscription takes a moment: what it misses it makes up for
            nonlocal number
            number += 1
            pages(first, 2 + number)
            return f"batch {number}: BlockStored; {2 + number} blocks\n" in said.read_text()

        until(heard_live)
        first.pages.removed(b"%032d" % 1, Medium.DEVICE)
        first.publish()
        until(lambda: f"BlockRemoved; {1 + number} blocks\n" in said.read_text())
        first.close()
        again = KvEventPublisher(config)

        def has_begun_again() -> bool:
            time.sleep(0.2)  # an engine needs seconds to start: subscribers have come back by then
            again.pages.cleared()
            pages(again, 7)
            return "AllBlocksCleared BlockStored; 1 blocks\n" in said.read_text()

        until(has_begun_again)
        again.close()
        assert example.wait(timeout=30) == 0
