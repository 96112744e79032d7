"""`nanoflow batch` on the sleeping engine, as a process of its own.

python -m benchmarks.cluster.sleeping_batch STEP_S INPUT OUTPUT [ADDRESS REPLICAS]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from benchmarks.cluster.sleeping_engine import make_engine
from benchmarks.server import DEMO_MODEL
from nanoflow_backend.commands.batch import batch

SETTINGS = {
    "device": "cpu", "dense_batch_tokens": 512, "max_running": 128, "kv_cache_tokens": 65536, "prefix_caching": False,
}  # fmt: skip


def main(step_s: str, input: str, output: str, address: str | None = None, replicas: str = "1") -> int:
    settings = [f"{name}={str(value).lower()}" for name, value in SETTINGS.items()]
    on = {"cluster": address, "replicas": int(replicas)} if address else {}
    sleeping = partial(make_engine, step_s=float(step_s))
    return batch(Path(DEMO_MODEL), Path(input), Path(output), settings, make_engine=sleeping, **on)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
