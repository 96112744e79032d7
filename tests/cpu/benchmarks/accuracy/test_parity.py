"""A run of all checkpoints that was cut goes on; one that is whole begins anew."""

import json

from benchmarks.accuracy.parity import unfinished


def test_only_a_run_that_was_cut_goes_on(tmp_path):
    output = tmp_path / "parity.json"
    assert unfinished(output) == []
    done = [{"checkpoint": {"architecture": "llama"}, "failed": []}]
    output.write_text(json.dumps({"of_checkpoints": 2, "done": done}))
    assert unfinished(output) == done
    output.write_text(json.dumps({"of_checkpoints": 1, "done": done}))
    assert unfinished(output) == []
