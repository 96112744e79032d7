"""Start tritonserver from environment variables, or say what is wrong with them before anything starts.

NANOFLOW_MODEL=/weights/Llama-3.1-8B serves that folder as the model "nanoflow". Every other field of EngineConfig may
be set likewise (NANOFLOW_KV_CACHE_TOKENS=131072), and four things that are not fields:

    NANOFLOW_MODEL_NAME        the name that clients use; default "nanoflow"
    NANOFLOW_GPU_DEVICE_IDS    an engine for each group of GPUs: "0;1" or "0,1;2,3"
    NANOFLOW_EXIT_TIMEOUT_S    how long requests may go on after SIGTERM; default 120
    NANOFLOW_MODEL_REPOSITORY  where a repository is mounted; default /models

Without NANOFLOW_MODEL the mounted repository is served as it is. Arguments go to tritonserver; a first argument that is
no option is run instead of it.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import read_model_config

PREFIX = "NANOFLOW_"
NOT_FIELDS = ("MODEL_NAME", "GPU_DEVICE_IDS", "EXIT_TIMEOUT_S", "MODEL_REPOSITORY")
MOUNTED = Path("/models")
GENERATED = Path("/tmp/nanoflow/models")
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 256 * 2**20  # a stub starts with 1 MiB and grows with what is in flight; docker's default is 64


def command(
    environment: Mapping[str, str],
    arguments: Sequence[str],
    mounted: Path = MOUNTED,
    generated: Path = GENERATED,
    shared_memory: Path = SHARED_MEMORY,
) -> list[str]:
    """The tritonserver command; writes the model's folder below `generated` where the environment describes one.

    Raises:
        ConfigError: naming the variable and what was expected.
    """
    given = {name.removeprefix(PREFIX): value for name, value in environment.items() if name.startswith(PREFIX)}
    known = {field.upper() for field in EngineConfig.__struct_fields__} | set(NOT_FIELDS)
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"{PREFIX}{unknown[0]}: unknown; known are {', '.join(PREFIX + name for name in sorted(known))}"
        )
    exit_timeout_s = given.pop("EXIT_TIMEOUT_S", "120")
    if not re.fullmatch(r"[0-9]+", exit_timeout_s):
        raise ConfigError(f"{PREFIX}EXIT_TIMEOUT_S: expected whole seconds, got {exit_timeout_s!r}")
    repository = given.pop("MODEL_REPOSITORY", None)
    if repository is not None and "MODEL" in given:
        raise ConfigError(f"{PREFIX}MODEL_REPOSITORY: expected it or {PREFIX}MODEL, got both")
    mounted = mounted if repository is None else Path(repository)
    room = os.statvfs(shared_memory)
    if room.f_blocks * room.f_frsize < SHARED_MEMORY_BYTES:
        raise ConfigError(
            f"{shared_memory} has {room.f_blocks * room.f_frsize >> 20} MiB, expected {SHARED_MEMORY_BYTES >> 20} or "
            "more: docker run --shm-size=1g, or in Kubernetes an emptyDir of medium Memory at this path"
        )
    if "MODEL" in given:
        write_model(given, generated)
    elif given:
        raise ConfigError(f"{PREFIX}{min(given)}: expected {PREFIX}MODEL too; without it {mounted} is served as it is")
    elif not any(mounted.glob("*/config.pbtxt")):
        raise ConfigError(f"{PREFIX}MODEL is not set, and {mounted} has no model folder with a config.pbtxt")
    server = ["tritonserver", f"--model-repository={generated if 'MODEL' in given else mounted}"]
    if ";" in given.get("GPU_DEVICE_IDS", ""):
        server.append("--rate-limit=execution_count")  # without it one of two engines got two thirds of the requests
    return [*server, f"--exit-timeout-secs={exit_timeout_s}", *arguments]


def write_model(given: Mapping[str, str], repository: Path) -> None:
    """A folder for the backend "nanoflow", checked as the server's start would check it."""
    name = given.get("MODEL_NAME", "nanoflow")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{PREFIX}MODEL_NAME: expected letters, digits, '.', '_' and '-', got {name!r}")
    gpus = given.get("GPU_DEVICE_IDS")
    if gpus is not None and not re.fullmatch(r"[0-9]+([,;][0-9]+)*", gpus):
        raise ConfigError(f'{PREFIX}GPU_DEVICE_IDS: expected groups as in "0;1" or "0,1;2,3", got {gpus!r}')
    fields = {field.lower(): value for field, value in given.items() if field not in NOT_FIELDS}
    config = EngineConfig.resolve(fields, relative_to=Path.cwd(), origin="environment")
    read_model_config(Path(config.model))

    instances = gpus.count(";") + 1 if gpus else 1
    lines = ['backend: "nanoflow"', f"instance_group [ {{ count: {instances}, kind: KIND_MODEL }} ]"]
    if gpus:
        lines.append(f'parameters {{ key: "gpu_device_ids" value {{ string_value: "{gpus}" }} }}')
    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text("\n".join(lines) + "\n")
    (version / "engine.json").write_text(json.dumps({**fields, "model": config.model}, indent=2))


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        os.execvp(arguments[0], arguments)
    os.umask(0o077)
    try:
        server = command(os.environ, arguments)
    except ConfigError as error:
        sys.exit(f"nanoflow: {error}")
    os.execvp(server[0], server)


if __name__ == "__main__":
    main()
