#!/bin/bash
# What Ray 2.60.0 makes of max_task_retries when the node of an actor is lost.
#
# Guessed: max_task_retries counts losses of the actor: with 3, a task is done again after each of three, as long as some
#   node has room for the actor.
# Seen: so it is where the actor's process is killed. Where its node is, one loss takes all three: until the cluster has
#   noticed, which takes some 10 s, each retry goes to the address that is no more, fails at once, and is counted. The
#   task ends with ActorUnavailableError, though another node has room. With -1 it is done again there.
#
# Exits 1 if that changes. Needs Python 3 with venv, and pip's index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat > "$folder/retries.py" <<'PYTHON'
import os
import signal
import sys
import time

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1)]
ray.init(cluster.address, log_to_driver=False, logging_level="error")


class Worker:
    def work(self, seconds):
        time.sleep(seconds)
        return os.getpid()


def outcome(retries, kill):
    """What becomes of a task whose actor is lost once."""
    worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=retries)(Worker).remote()
    pid = ray.get(worker.work.remote(0))
    task = worker.work.remote(5)
    time.sleep(1)
    kill(pid)
    try:
        ray.get(task)
        return "done again"
    except ray.exceptions.RayError as error:
        return type(error).__name__
    finally:
        ray.kill(worker)


def lose_node(pid):
    nodes.append(cluster.add_node(num_cpus=1))  # has room
    cluster.remove_node(nodes.pop(0), allow_graceful=False)


changed = 0
for what, retries, kill, seen in [
    ("its process", 3, lambda pid: os.kill(pid, signal.SIGKILL), "done again"),
    ("its node", 3, lose_node, "ActorUnavailableError"),
    ("its node", -1, lose_node, "done again"),
]:
    found = outcome(retries, kill)
    changed += found != seen
    print(f"ray {ray.__version__}: an actor with max_task_retries={retries} loses {what}: {found}", flush=True)
sys.exit(changed > 0)
PYTHON
"$folder/venv/bin/python" "$folder/retries.py" 2> "$folder/log" | grep "^ray "  # Ray tells of lost nodes too
