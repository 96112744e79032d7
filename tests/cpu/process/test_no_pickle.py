"""A whole tensor-parallel run in which no process unpickles anything, and whose files are private."""

import os
import subprocess
import sys

from support.places import DEMO_MODEL

# In every process of the run: Python says when an unpickler looks up what to call.
WATCH = """
import os, sys

def watch(event, arguments):
    if event == "pickle.find_class":
        with open(os.environ["UNPICKLED"], "a") as file:
            file.write(f"{arguments}\\n")

sys.addaudithook(watch)
with open(os.environ["WATCHED"], "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
RUN = """
import os, sys
os.umask(0)
from nanoflow_backend.engine import LLM, SamplingParams
llm = LLM.from_pretrained(sys.argv[1], tensor_parallel=2, kv_cache_tokens=1024, dense_batch_tokens=64)
folder = llm.engine.executor._ranks._folder.name
print(oct(os.stat(folder).st_mode & 0o777))
print(llm.generate(["Return the"], SamplingParams(max_tokens=8, temperature=0))[0].text)
llm.close()
"""


def test_no_process_of_a_run_unpickles(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    unpickled, watched = tmp_path / "unpickled", tmp_path / "watched"
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "UNPICKLED": str(unpickled), "WATCHED": str(watched)}
    run = [sys.executable, "-c", RUN, str(DEMO_MODEL)]
    mode, text = subprocess.run(
        run, env=environment, check=True, capture_output=True, text=True, timeout=300
    ).stdout.split("\n", 1)
    assert mode == "0o700"  # where the ranks meet, whatever the umask
    assert text.strip()
    assert len(watched.read_text().split()) == 2
    assert not unpickled.exists(), unpickled.read_text()
    look = "import pickle; pickle.loads(pickle.dumps(print))"
    subprocess.run([sys.executable, "-c", look], env=environment, check=True, timeout=60)
    assert "print" in unpickled.read_text()  # the watch works
