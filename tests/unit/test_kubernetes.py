"""docker/kubernetes and docker/prometheus agree with the image, the pages and the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.places import ROOT
from typer.main import get_command

from nanoflow_backend.__main__ import app
from nanoflow_backend.config.engine_config import EngineConfig

KUBERNETES = ROOT / "docker" / "kubernetes"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERNETES / name).read_text())
    return loaded


def test_images_have_the_packages_version() -> None:
    (runtime,) = manifest("kserve/serving-runtime.yaml")["spec"]["containers"]
    (image,) = manifest("base/kustomization.yaml")["images"]
    compose = yaml.safe_load((ROOT / "docker" / "compose.yml").read_text())
    assert runtime["image"] == f"nanoflow:{VERSION}" == compose["services"]["server"]["image"]
    assert image["newTag"] == VERSION
    for page in ("README.md", "Dockerfile"):
        tags = re.findall(r"-t nanoflow(\S*)", (ROOT / "docker" / page).read_text())
        assert tags == [f":{VERSION}", f":{VERSION}-slim", f":{VERSION}-sdk"]


def test_the_kserve_runtime_keeps_the_images_entrypoint_and_declares_both_ports() -> None:
    """The entrypoint sets the umask that keeps the server's shared memory private."""
    (runtime,) = manifest("kserve/serving-runtime.yaml")["spec"]["containers"]
    assert "command" not in runtime
    environment = {entry["name"]: entry["value"] for entry in runtime["env"]}
    assert environment["NANOFLOW_MODEL_REPOSITORY"] == "/mnt/models"
    ports = {port["name"]: port["containerPort"] for port in runtime["ports"]}
    assert ports == {"http1": 8080, "h2c": 9000}
    assert {"--http-port=8080", "--grpc-port=9000"} == set(runtime["args"])
    service = manifest("kserve/inference-service.yaml")
    assert service["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Standard"}
    assert service["spec"]["predictor"]["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("folder", "labels", "requests", "metrics"),
    [
        ("base", {"app.kubernetes.io/name": "nanoflow"}, ["http", "grpc"], ["metrics"]),
        ("kserve", {"serving.kserve.io/inferenceservice": "nanoflow"}, [8080, 9000], [8002]),
    ],
)
def test_only_named_clients_reach_a_server_that_authenticates_nobody(
    folder: str, labels: dict[str, str], requests: list[Any], metrics: list[Any]
) -> None:
    policy = manifest(f"{folder}/network-policy.yaml")
    assert (policy["kind"], policy["spec"]["policyTypes"]) == ("NetworkPolicy", ["Ingress"])
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    rules = policy["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in rules] == [requests, metrics]
    selectors = [selector for rule in rules for peer in rule["from"] for selector in peer.values()]
    assert selectors
    assert all(selector["matchLabels"] for selector in selectors)


def test_the_base_applies_all_of_its_manifests() -> None:
    listed = manifest("base/kustomization.yaml")["resources"]
    assert {path.name for path in (KUBERNETES / "base").glob("*.yaml")} == {*listed, "kustomization.yaml"}


def test_every_alert_links_to_its_section_of_the_runbook() -> None:
    alerts = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert rules
    sections = []
    for rule in rules:
        page, anchor = rule["annotations"]["runbook_url"].split("#")
        headings = re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        (section,) = (heading for heading in headings if heading.lower().replace(" ", "-") == anchor)
        assert section == rule["alert"]
        sections.append(section)
    assert sections == headings, "a section without an alert, or in another order"


def test_the_leader_worker_set_is_one_group_of_hosts(tmp_path: Path) -> None:
    """Settings that the engine takes, ranks that find them, and probes that outwait the hosts."""
    kustomization = manifest("leader-worker-set/kustomization.yaml")
    assert kustomization["images"][0]["newTag"] == VERSION
    listed = kustomization["resources"]
    assert {path.name for path in (KUBERNETES / "leader-worker-set").glob("*.yaml")} == {*listed, "kustomization.yaml"}
    (settings,) = kustomization["configMapGenerator"]
    given = dict(literal.split("=", 1) for literal in settings["literals"])
    fields = {name.removeprefix("NANOFLOW_").lower(): value for name, value in given.items()}
    exit_timeout_s = int(fields.pop("exit_timeout_s"))
    config = EngineConfig.resolve(fields, relative_to=tmp_path)
    group = manifest("leader-worker-set/leader-worker-set.yaml")["spec"]["leaderWorkerTemplate"]
    assert config.hosts == group["size"] == 2
    leader, other = (group[name]["spec"] for name in ("leaderTemplate", "workerTemplate"))
    (server,), (ranks,) = leader["containers"], other["containers"]
    for pod, container in ((leader, server), (other, ranks)):
        assert container["envFrom"] == [{"configMapRef": {"name": settings["name"]}}]
        assert pod["enableServiceLinks"] is False
        assert pod["terminationGracePeriodSeconds"] > exit_timeout_s
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert config.secret_file == f"{mounted['secret']}/ranks"
        (secret,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "secret")
        assert secret["defaultMode"] & 0o007 == 0  # an int, as YAML 1.1 reads it
    assert "29400" in str(server["ports"])
    assert "command" not in ranks
    program, command, *options = ranks["args"]
    assert program == "nanoflow"
    known = {option for parameter in get_command(app).commands[command].params for option in parameter.opts}
    told = dict(option.split("=", 1) for option in options)
    assert told.keys() <= known
    assert told["--secret-file"] == config.secret_file
    startup = server["startupProbe"]
    assert config.join_timeout_s < startup["periodSeconds"] * startup["failureThreshold"]
    assert config.join_timeout_s < float(told["--join-timeout"])
    (rules,) = (manifest("leader-worker-set/network-policy.yaml")["spec"]["ingress"],)
    among, *others = rules
    labels = group["workerTemplate"]["metadata"]["labels"]
    assert among == {"from": [{"podSelector": {"matchLabels": {key: labels[key] for key in labels if "/name" in key}}}]}
    assert [[port["port"] for port in rule["ports"]] for rule in others] == [["http", "grpc"], ["metrics"]]
    selector = manifest("leader-worker-set/service.yaml")["spec"]["selector"]
    assert selector.items() <= group["leaderTemplate"]["metadata"]["labels"].items()
    assert not selector.items() <= labels.items()  # requests are for the server
