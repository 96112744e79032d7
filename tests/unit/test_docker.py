"""docker/: the entrypoint, and files that must agree with each other and with the code."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from support.places import DEMO_MODEL, ROOT

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError

DOCKER = ROOT / "docker"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


entrypoint, lint = script("entrypoint"), script("lint")
LEADER_WORKER_SET = DOCKER / "kubernetes" / "leader-worker-set" / "leader-worker-set.yaml"


@pytest.fixture
def command(tmp_path):
    """The entrypoint, where nothing is mounted and shared memory is what the test's folder has."""

    def run(environment, arguments=(), **places):
        folders = {"mounted": tmp_path / "mounted", "generated": tmp_path / "generated", "shared_memory": tmp_path}
        return entrypoint.command(environment, arguments, **{**folders, **places})

    return run


def test_the_environment_becomes_a_model_folder(command, tmp_path):
    environment = {
        "PATH": "/bin",
        "NANOFLOW_MODEL": str(DEMO_MODEL),
        "NANOFLOW_MODEL_NAME": "chat",
        "NANOFLOW_TENSOR_PARALLEL": "2",
        "NANOFLOW_PREFIX_CACHING": "false",
        "NANOFLOW_GPU_DEVICE_IDS": "0,1;2,3",
        "NANOFLOW_EXIT_TIMEOUT_S": "7",
    }
    generated = tmp_path / "generated"
    assert command(environment, ["--log-verbose=1"]) == [
        "tritonserver",
        f"--model-repository={generated}",
        "--rate-limit=execution_count",
        "--exit-timeout-secs=7",
        "--log-verbose=1",
    ]
    config = EngineConfig.load(generated / "chat" / "1" / "engine.json")
    assert config == EngineConfig(model=str(DEMO_MODEL), tensor_parallel=2, prefix_caching=False)
    pbtxt = (generated / "chat" / "config.pbtxt").read_text()
    assert 'backend: "nanoflow"' in pbtxt
    assert "count: 2, kind: KIND_MODEL" in pbtxt
    assert 'key: "gpu_device_ids" value { string_value: "0,1;2,3" }' in pbtxt


def test_every_field_can_be_set(command, tmp_path):
    defaults = zip(EngineConfig.__struct_fields__[1:], EngineConfig.__struct_defaults__, strict=True)
    said = {name: ",".join(d) if isinstance(d, tuple) else str(d) for name, d in defaults if d is not None}
    values = {f"NANOFLOW_{name.upper()}": value for name, value in said.items()}
    command({"NANOFLOW_MODEL": str(DEMO_MODEL), **values})
    assert EngineConfig.load(tmp_path / "generated" / "nanoflow" / "1" / "engine.json") == EngineConfig(
        model=str(DEMO_MODEL)
    )


def test_a_mounted_repository_is_served_as_it_is(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.pbtxt").touch()
    assert f"--model-repository={tmp_path}" in command({}, mounted=tmp_path)
    assert not (tmp_path / "generated").exists()


def test_the_repository_may_be_mounted_elsewhere(command, tmp_path):
    elsewhere = tmp_path / "mnt"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine" / "config.pbtxt").touch()
    environment = {"NANOFLOW_MODEL_REPOSITORY": str(elsewhere), "NANOFLOW_EXIT_TIMEOUT_S": "7"}
    server = command(environment, ["--http-port=8080"])
    assert server == ["tritonserver", f"--model-repository={elsewhere}", "--exit-timeout-secs=7", "--http-port=8080"]
    with pytest.raises(ConfigError, match="NANOFLOW_MODEL_REPOSITORY: expected it or NANOFLOW_MODEL, got both"):
        command({**environment, "NANOFLOW_MODEL": str(DEMO_MODEL)})


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "NANOFLOW_MODEL is not set, and .*/mounted has no model folder"),
        ({"NANOFLOW_SEED": "1"}, "NANOFLOW_SEED: expected NANOFLOW_MODEL too"),
        ({"NANOFLOW_PAGE_SIZE": "1"}, "NANOFLOW_PAGE_SIZE: unknown; known are .*NANOFLOW_PAGE_TOKENS"),
        ({"NANOFLOW_MODEL": "/nowhere"}, "/nowhere: there is no such folder"),
        (
            {"NANOFLOW_MODEL": str(DEMO_MODEL), "NANOFLOW_SEED": "x"},
            r"environment: Expected `int`, got `str` - at `\$\.seed`",
        ),
        (
            {"NANOFLOW_MODEL": str(DEMO_MODEL), "NANOFLOW_TENSOR_PARALLEL": "3"},
            "tensor_parallel: expected 1, 2, 4 or 8",
        ),
        ({"NANOFLOW_MODEL": str(DEMO_MODEL), "NANOFLOW_MODEL_NAME": "../up"}, "NANOFLOW_MODEL_NAME: expected letters"),
        (
            {"NANOFLOW_MODEL": str(DEMO_MODEL), "NANOFLOW_GPU_DEVICE_IDS": '0" }'},
            "NANOFLOW_GPU_DEVICE_IDS: expected groups",
        ),
        (
            {"NANOFLOW_MODEL": str(DEMO_MODEL), "NANOFLOW_EXIT_TIMEOUT_S": "2m"},
            "NANOFLOW_EXIT_TIMEOUT_S: expected whole",
        ),
    ],
)
def test_a_bad_environment_is_named_and_writes_nothing(command, tmp_path, environment, complaint):
    with pytest.raises(ConfigError, match=complaint):
        command(environment)
    assert not list(tmp_path.iterdir())


def test_too_little_shared_memory_is_refused(command, monkeypatch):
    monkeypatch.setattr(entrypoint, "SHARED_MEMORY_BYTES", 2**62)
    with pytest.raises(ConfigError, match=r"MiB, expected .*--shm-size=1g"):
        command({"NANOFLOW_MODEL": str(DEMO_MODEL)})


def test_the_entrypoint_runs_another_command_and_refuses_without_a_traceback(tmp_path):
    run = [sys.executable, DOCKER / "entrypoint.py"]
    paths = ":".join(path for path in sys.path if path)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": paths}
    shell = subprocess.run([*run, "echo", "hello"], env=environment, capture_output=True, text=True, timeout=60)
    assert shell.stdout == "hello\n"
    unknown = environment | {"NANOFLOW_MODLE": "x"}
    refused = subprocess.run(run, env=unknown, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.startswith("nanoflow: NANOFLOW_MODLE: unknown; known are NANOFLOW_")


def test_what_compose_mounts_is_there():
    compose = yaml.safe_load((DOCKER / "compose.yml").read_text())
    mounts = [mount.split(":")[0] for service in compose["services"].values() for mount in service["volumes"]]
    assert {"./prometheus", "./grafana/provisioning", "./grafana/dashboards"} <= set(mounts)
    for mount in mounts:
        assert not mount.startswith(".") or (DOCKER / mount).is_dir(), mount
    prometheus = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert all((DOCKER / "prometheus" / file).is_file() for file in prometheus["rule_files"])


def test_requests_have_the_time_to_end():
    """Docker and Kubernetes kill later than the server gives up; the probes do not kill what still loads."""
    compose = yaml.safe_load((DOCKER / "compose.yml").read_text())
    exit_timeout_s = 120
    assert int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")) > exit_timeout_s
    pod = yaml.safe_load((DOCKER / "kubernetes" / "base" / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    pre_stop_s = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + exit_timeout_s
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert startup["httpGet"] == server["readinessProbe"]["httpGet"]
    assert not pod["enableServiceLinks"]  # NANOFLOW_PORT and the like
    assert startup["httpGet"]["path"] == "/v2/models/nanoflow/ready"


def test_deployed_metrics_exist():
    """Each name that an autoscaler, an alert or a dashboard uses is one that the server has."""
    source = "\n".join(path.read_text() for path in (ROOT / "nanoflow_backend" / "telemetry").glob("*.py"))
    made = set(re.findall(r'"(nanoflow_\w+)"', source))
    files = [path for path in DOCKER.rglob("*") if path.suffix in (".yml", ".yaml", ".json") and path.is_file()]
    text = "\n".join(path.read_text() for path in files)
    used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bnanoflow_\w+", text)}
    assert made
    assert used
    assert used <= made


def test_the_linter_sees_the_pods_of_a_leader_worker_set():
    """Their kind has no schema here; pods have one."""
    found = [yaml.safe_load(pod) for pod in lint.pods(LEADER_WORKER_SET.read_text())]
    assert [pod["kind"] for pod in found] == ["Pod", "Pod"]
    templates = yaml.safe_load(LEADER_WORKER_SET.read_text())["spec"]["leaderWorkerTemplate"]
    assert [pod["spec"] for pod in found] == [templates["leaderTemplate"]["spec"], templates["workerTemplate"]["spec"]]
    assert lint.pods((DOCKER / "kubernetes" / "base" / "deployment.yaml").read_text()) == []
    overlays = [command[-1] for command in lint.checks()["kubectl"]]
    assert str(LEADER_WORKER_SET.parent) in overlays


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")
@pytest.mark.parametrize("folder", ["base", "overlays/hpa", "overlays/keda", "overlays/cpu"])
def test_overlays_build(folder):
    build = ["kubectl", "kustomize", str(DOCKER / "kubernetes" / folder)]
    documents = list(yaml.safe_load_all(subprocess.run(build, check=True, capture_output=True, timeout=60).stdout))
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (folder != "overlays/cpu")
    (config,) = (document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap")
    assert server["envFrom"] == [{"configMapRef": {"name": config}}]
    (config_map,) = (document["data"] for document in documents if document["kind"] == "ConfigMap")
    assert config_map.keys() <= {f"NANOFLOW_{name.upper()}" for name in EngineConfig.__struct_fields__} | {
        "NANOFLOW_EXIT_TIMEOUT_S"
    }
