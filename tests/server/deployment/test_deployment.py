"""The ways to deploy: as a backend folder, in vllm_backend's place, with several engines, with a packed environment."""

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
from packaging.requirements import Requirement
from support.places import DEMO_MODEL, ROOT
from support.server.clients import generate, metrics_page, post
from support.waiting import until

from nanoflow_backend.embedded.server import OWN_PACKAGES
from nanoflow_backend.engine import LLM, SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 24}
PROMPTS = [
    f"Return the {word}" for word in ("list", "string", "number of items", "value", "name", "file", "type", "key")
]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_model(repository, name, config, **engine):
    """All that a model of the backend folder needs: two files."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    (repository / name / "1" / "engine.json").write_text(json.dumps({"model": str(DEMO_MODEL), **engine}))
    return repository


def pbtxt(count=1, **parameters):
    entries = [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    ]
    group = f"instance_group [ {{ count: {count}, kind: KIND_MODEL }} ]"
    return "\n".join(['backend: "nanoflow"', group, *entries])


@pytest.fixture(scope="module")
def expected():
    return LLM.from_pretrained(DEMO_MODEL).generate(PROMPTS, SamplingParams(**GREEDY))


@pytest.fixture(scope="module")
def twins(server, tmp_path_factory):
    """One model on two engines, and one as the container's entrypoint writes it; both from the backend folder."""
    repository = add_model(tmp_path_factory.mktemp("repository"), "twins", pbtxt(count=2))
    script("entrypoint").write_model({"MODEL": str(DEMO_MODEL), "MODEL_NAME": "described"}, repository)
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ["--model-control-mode=explicit", "--load-model=*", "--rate-limit=execution_count"]
    backends = tmp_path_factory.mktemp("backends")
    for name in ("nanoflow", "vllm"):  # the folder takes the place of another backend under that one's name
        shutil.copytree(ROOT / "backends" / "nanoflow", backends / name)
    return server(repository, backends=backends, log=log, exit_timeout_s=30, arguments=arguments)


def engines(processes):
    return [pid for pid in processes if b"nanoflow_backend.engine.loop" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def cached_pages(url):
    """Of each engine."""
    return {
        engine: float(value)
        for engine, value in re.findall(
            r'nanoflow_kv_cache_pages\{engine="(\w+)".*state="cached".*\} (\S+)', metrics_page(url)
        )
    }


def test_two_engines_share_the_requests_of_one_model(twins, process_tree, expected):
    assert len(engines(process_tree(twins.pid))) == 3

    def run(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        return generate(twins.http_url, "twins", text_input=prompt, exclude_input_in_output=True, **GREEDY)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, range(64)))
    assert [answer["text_output"] for answer in answers] == [completion.text for completion in expected] * 8
    assert cached_pages(twins.metrics_url).keys() == {"described_0_0", "twins_0_0", "twins_0_1"}
    for engine in ("twins_0_0", "twins_0_1"):
        until(lambda engine=engine: cached_pages(twins.metrics_url)[engine] > 0)


def test_the_entrypoints_folder_serves(twins, expected):
    answer = generate(twins.http_url, "described", text_input=PROMPTS[0], exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == expected[0].text


def test_the_health_check_asks_each_model(twins):
    check = [sys.executable, "-I", ROOT / "docker" / "healthcheck.py"]
    assert subprocess.run([*check, f"http://{twins.http_url}"], timeout=60).returncode == 0
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(twins.grpc_url)) as client:
        client.unload_model("described")
    sick = subprocess.run([*check, f"http://{twins.http_url}"], capture_output=True, text=True, timeout=60)
    assert sick.returncode == 1
    assert sick.stderr.startswith("not ready: model described: UN")  # UNLOADING or UNAVAILABLE
    nobody = subprocess.run([*check, "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60)
    assert (nobody.returncode, nobody.stderr[:10]) == (1, "not ready:")


def test_the_shared_memory_is_private(twins):
    modes = {file.stat().st_mode & 0o777 for file in Path("/dev/shm").glob(f"{twins.shm_prefix}*")}
    assert modes == {0o600}


VLLM_CONFIG = """
name: "vllm_model"
backend: "vllm"
max_batch_size: 0
model_transaction_policy { decoupled: True }
input [
  { name: "text_input", data_type: TYPE_STRING, dims: [ 1 ] },
  { name: "stream", data_type: TYPE_BOOL, dims: [ 1 ] },
  { name: "sampling_parameters", data_type: TYPE_STRING, dims: [ 1 ], optional: true },
  { name: "image", data_type: TYPE_STRING, dims: [ -1 ], optional: true },
  { name: "return_num_input_tokens", data_type: TYPE_BOOL, dims: [ 1 ], optional: true }
]
output [
  { name: "text_output", data_type: TYPE_STRING, dims: [ -1 ] },
  { name: "num_input_tokens", data_type: TYPE_UINT32, dims: [ 1 ] }
]
instance_group [ { count: 1, kind: KIND_MODEL } ]
parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "true" } }
"""


def test_a_folder_of_the_vllm_backend_serves_unchanged(twins, expected):
    folder = twins.model_repository / "vllm_model"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(VLLM_CONFIG)
    args = {"model": str(DEMO_MODEL), "disable_log_requests": True, "gpu_memory_utilization": 0.5, "max_model_len": 256}
    (folder / "1" / "model.json").write_text(json.dumps(args))
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(twins.grpc_url)) as client:
        client.load_model("vllm_model")
        prompt = {"text_input": PROMPTS[0], "stream": False, "return_num_input_tokens": True, **GREEDY}
        answer = generate(twins.http_url, "vllm_model", **prompt)
        assert answer["text_output"] == PROMPTS[0] + expected[0].text
        assert answer["num_input_tokens"] == expected[0].num_input_tokens
        status, text = post(twins.http_url, "vllm_model", "generate", {**prompt, "image": "none"})
        assert (status, json.loads(text)["error"]) == (400, "image: not implemented; expected no such input")
        status, text = post(twins.http_url, "vllm_model", "generate", {**prompt, "text_input": "Return " * 300})
        assert (status, "prompt: expected at most 255 tokens" in text) == (400, True)
    assert "without effect here: disable_log_requests (" in Path(twins.log).read_text()


def test_a_packed_environment(server, process_tree, tmp_path, monkeypatch, expected):
    """The stub runs in the archive's packages, which have no torch; the engine in an interpreter that has it."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    required = [Requirement(line) for line in importlib.metadata.requires("nanoflow-triton")]
    for name in [*(requirement.name for requirement in required if not requirement.marker), "MarkupSafe"]:
        for file in importlib.metadata.files(name):
            if ".." not in file.parts and file.locate().is_file():
                (site / file.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), site / file)
    for package in OWN_PACKAGES:
        shutil.copytree(Path(importlib.util.find_spec(package).origin).parent, site / package)
    script("pack_environment").pack(environment, tmp_path / "environment.tar.gz")
    shutil.rmtree(environment)

    sources = [Path(importlib.util.find_spec(package).origin).parents[1] for package in OWN_PACKAGES]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, sources)))  # the engine's: the stub ignores it
    repository = tmp_path / "repository"
    config = pbtxt(EXECUTION_ENV_PATH=tmp_path / "environment.tar.gz")
    add_model(repository, "packed", config, python=sys.executable)
    packed = server(repository, backends=ROOT / "backends", log=tmp_path / "log")
    answer = generate(packed.http_url, "packed", text_input=PROMPTS[0], exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == expected[0].text
    (stub,) = (pid for pid, name in process_tree(packed.pid).items() if name == "triton_python_b")
    libraries = re.findall(
        r"(/\S*)/lib/python\S*/site-packages/(?!(?:nvidia_)?pytriton)", Path(f"/proc/{stub}/maps").read_text()
    )
    assert libraries
    assert all(folder.startswith("/tmp/python_env_") for folder in libraries)
    packed.stop()
