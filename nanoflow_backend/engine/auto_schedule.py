"""find_auto_schedule finds the file that the schedule "auto" stands for: found before, or by a short search now."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.computed import read_computed
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens

log = logging.getLogger(__name__)
AUTO = "auto"
MINUTES = 15.0  # of a search while a model loads; the next load goes on with it
COMMAND = (sys.executable, "-m", "nanoflow_search")
EFFORT = ("--plans", "3", "--rounds", "4", "--turns", "2", "--time-limit-s", "20")
TILE, LEAST = 128, 256  # tokens: sizes that the search plans for are multiples, from the least on


def find_auto_schedule(
    config: EngineConfig, device: Device, *, command: Sequence[str] = COMMAND, minutes: float = MINUTES
) -> EngineConfig:
    """`config`; where its schedule is "auto", with the file in the cache of this model, device, group and workload.

    A file that this engine could not run, such as one of another model, is replaced. Where there is none, and none can
    be found, the schedule is sequential; a line of the log says why.
    """
    if config.schedule != AUTO:
        return config
    _, model_config = read_computed(config, device.kind)
    model = build(model_config, config.tensor_parallel)
    path = _cached(config, device, model)
    found = replace(config, schedule=str(path))
    why = None
    try:
        with _alone(path):
            if path.exists() and (fault := _fault(found, device, model)):
                log.warning("schedule auto: %s; searching again", fault)
                path.unlink()
            if not path.exists():
                why = _search(config, device, path, command, minutes) or _fault(found, device, model)
    except (OSError, ConfigError) as error:  # such as a cache that cannot be written
        why = str(error)
    if why is not None:
        log.warning("schedule auto: sequential, for %s", why)
        return replace(config, schedule="sequential")
    log.info("schedule auto: %s", path)
    return found


def _cached(config: EngineConfig, device: Device, model: Model) -> Path:
    precision = config.precision_on(device.kind)
    cache = config.schedule_cache or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nanoflow", "schedules"
    )
    parts = (
        f"{fingerprint(*model.layers)}-{model.num_layers}",
        "-".join(dict.fromkeys((precision.weights, precision.activations, precision.kv))),
        f"tp{config.tensor_parallel}",
        config.schedule_workload.replace("/", "-"),
        *([] if config.dense_batch_tokens is None else [f"{config.dense_batch_tokens}"]),
    )
    return Path(cache).expanduser() / re.sub(r"\W+", "-", f"{device.name} {device.sms}") / f"{'_'.join(parts)}.json"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of several engines that load the same model, one searches and the others wait for its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fault(config: EngineConfig, device: Device, model: Model) -> str | None:
    """What is wrong with the file that is the configuration's schedule; None: this engine can run it.

    Raises:
        ConfigError: nothing is, but the configuration does not go with it: its steps are smaller than `max_running`.
    """
    try:
        sized = replace(config, dense_batch_tokens=named_dense_batch_tokens(config))
        find_schedules(sized.settle(device.kind), model, device.name, device.sms)
    except ScheduleError as error:
        return str(error)
    return None


def _precision(config: EngineConfig, device: Device) -> list[str]:
    """What the search is told about precision."""
    quantization = [] if config.quantization is None else ["--quantization", config.quantization]
    kv = [] if config.kv_cache_dtype == "auto" else ["--kv-cache-dtype", config.kv_cache_dtype]
    return ["--dtype", config.precision_on(device.kind).weights, *quantization, *kv]


def _search(config: EngineConfig, device: Device, path: Path, command: Sequence[str], minutes: float) -> str | None:
    """Write the file. What stands in the way, if something does."""
    if device.kind == "cpu":
        return "on a CPU nothing runs side by side"
    if absent := [name for name in ("nanoflow_search", "scipy") if find_spec(name) is None]:
        return f"{' and '.join(absent)} cannot be imported: pip install 'nanoflow-triton[search]'"
    sizes = []
    if config.dense_batch_tokens is not None:
        sizes = ["--dense-batch-tokens", str(max(-(-config.dense_batch_tokens // TILE) * TILE, LEAST))]
    log.info("schedule auto: searching for at most %g minutes; what is found is kept in %s", minutes, path)
    child = subprocess.Popen(
        [
            *command,
            *("--model", config.model, "--tp", str(config.tensor_parallel), "--workload", config.schedule_workload),
            *("--out", str(path), *_precision(config, device), *sizes, *EFFORT),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        child.kill()  # it goes on from its files

    timer = threading.Timer(60 * minutes, stop)
    timer.daemon = True
    timer.start()
    line = ""
    assert child.stdout is not None
    for line in child.stdout:
        log.info("nanoflow-search: %s", line.rstrip())
    timer.cancel()
    status = child.wait()
    if stopped.is_set():
        return f"the search took more than {minutes:g} minutes: the next load goes on with it"
    return None if status == 0 and path.exists() else f"the search failed ({status}): {line.strip()}"
