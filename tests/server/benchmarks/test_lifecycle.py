"""Loading and unloading the model leaves nothing behind. The long run: `python -m benchmarks lifecycle`, 50 cycles."""

import json
import os
import subprocess
import sys

from support.places import ROOT


def test_loads_reloads_and_unloads_leave_nothing(tmp_path):
    script = [sys.executable, "-m", "benchmarks", "lifecycle", "--model", "demo/tiny-llama"]
    path = {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    subprocess.run(
        [*script, "--cycles", "2", "--output", tmp_path / "result.json"],
        cwd=ROOT,
        env=os.environ | path,
        check=True,
        timeout=300,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    first, most = result["after_1"], result["most_after_the_first_cycle"]
    for what in ("processes", "threads", "file_descriptors", "shm_files", "shm_bytes"):
        assert most[what] <= first[what], what
    assert most["processes"] == result["before"]["processes"]
    assert most["shm_files"] == 0
