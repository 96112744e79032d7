"""A rank without torch: it starts like one and counts what it gets. Its environment says whether and when it ends.

Where there is host memory below the device, it says that as many slots are there as its number, and that each message
was a transfer, and is done.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from nanoflow_backend.hosts.messages import Progress, RankReport, StartRank
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.process.child import Parent


def main() -> None:
    parent = Parent()
    start: StartRank = parent.receive(msgspec.msgpack.Decoder(StartRank))
    folder = Path(os.environ["FAKE_RANKS"])
    config = start.settled.config
    schedule = Path(config.schedule).read_text() if config.schedule.endswith(".json") else config.schedule
    (folder / f"start-{start.rank}").write_text(f"{start.rendezvous} {start.interface} {config.model} {schedule}")
    (folder / f"pid-{os.getpid()}").touch()
    parent.send(Progress())
    if (folder / "no weights").exists():
        parent.send(Progress("ConfigError: no weights here"))
        os._exit(1)
    if config.host_kv_cache_bytes:
        parent.send(RankReport(start.rank, TransferReport(slots=start.rank)))
    parent.send(Progress())
    while True:
        message: Any = parent.receive(msgspec.msgpack.Decoder())
        if message == "end":
            os._exit(3)  # at once: a parent waits END_S between the end of its socket and that of the process
        with (folder / f"got-{start.rank}").open("a") as file:
            file.write(f"{message}\n")
        if config.host_kv_cache_bytes:
            parent.send(RankReport(start.rank, TransferReport([message], slots=start.rank)))


if __name__ == "__main__":
    main()
