"""EngineStage called as Ray Data calls it, from several threads of one process; without a cluster."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from msgspec.structs import replace
from support.commands.command_line import environment, run_here
from support.commands.json_lines import write_lines

from nanoflow_backend.cluster.engine_stage import ENGINE_ENDED, LINES, RESULTS, EngineStage
from nanoflow_backend.cluster.parcels import PARCEL_RESULTS, PARCELS, ParcelStage
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine.settled_on import settled_on
from nanoflow_backend.offline.made_with import MadeWith

TEXTS = [b'{"prompt": "page %d", "max_tokens": 9, "temperature": %d}' % (n, n % 2) for n in range(90)]
TEXTS[7], TEXTS[31] = b"{not json", b'{"prompt": "a", "top_p": 2}'


@pytest.fixture
def config(model):
    return EngineConfig(model=str(model), device="cpu", dense_batch_tokens=16)


def test_calls_from_many_threads_share_an_engine_and_keep_their_lines(model, config, tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", TEXTS), tmp_path / "out.jsonl"
    run_here("batch", "--model", model, "--input", source, "--output", output)
    stage = EngineStage(config)
    batches = [range(start, min(start + 13, 90)) for start in range(0, 90, 13)]
    with ThreadPoolExecutor(len(batches)) as threads:
        tables = list(
            threads.map(lambda part: stage(pa.table([list(part), [TEXTS[n] for n in part]], schema=LINES)), batches)
        )
    rows = pa.concat_tables(tables)
    assert rows.schema == RESULTS
    assert rows["number"].to_pylist() == list(range(90))
    assert rows["result"].to_pylist() == output.read_bytes().splitlines()
    assert [n for n, failed in enumerate(rows["failed"].to_pylist()) if failed] == [7, 31]
    record = output.with_name("out.jsonl.run").read_text().splitlines()
    assert rows["digest"].to_pylist() == record[1:]
    assert sum(rows["tokens"].to_pylist()) == output.read_bytes().count(b',"num_output_tokens":9}') * 9
    assert stage(LINES.empty_table()).num_rows == 0


def test_a_parcel_is_its_lines(config):
    parcel = ParcelStage(config)(pa.table([[30], [TEXTS[30:35]]], schema=PARCELS))
    rows = EngineStage(config)(pa.table([list(range(30, 35)), TEXTS[30:35]], schema=LINES))
    assert parcel.schema == PARCEL_RESULTS
    assert parcel["results"].to_pylist() == [rows.to_pylist()]


def test_a_node_with_another_model_or_setting_is_refused(config):
    made_with = MadeWith.of(settled_on("cpu", config))
    with pytest.raises(ConfigError, match=r"^on .*: seed was 0, is 1\. Expected the same on all nodes$"):
        EngineStage(replace(config, seed=1), made_with)
    EngineStage(config, made_with)


DYING = """
import sys
import pyarrow as pa
from nanoflow_backend.cluster.engine_stage import LINES, EngineStage
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.engine import Engine

def make_engine(config):
    engine = Engine(config)
    def step():
        raise RuntimeError("the device is gone")
    engine.step = step
    return engine

stage = EngineStage(EngineConfig(model=sys.argv[1], device="cpu"), make_engine=make_engine)
print(stage(pa.table([[0], [b'{"prompt": "a"}']], schema=LINES)))
"""


def test_an_engine_that_fails_ends_its_process(model):
    """Which is how Ray knows that the rows are to be done again."""
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(model)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (ENGINE_ENDED, "")
    assert "the engine failed, and ends its process" in done.stderr
    assert "the device is gone" in done.stderr
