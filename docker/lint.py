"""Check everything that is deployed with the linters that are there, and name those that are not.

`make lint-deploy` installs the ones that pip has. Exit status 1: something was found; 0: nothing, whatever is missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"
KUBERNETES_VERSION = "1.34"  # `sleep` in preStop is on by default since 1.30
VALIDATE = ["kubernetes-validate", "--strict", "--quiet", "--no-warn", "-k", KUBERNETES_VERSION]  # CRDs are not known
YAML_RULES = """{
  extends: default,
  rules: {line-length: disable, document-start: disable, comments: {min-spaces-from-content: 1},
          braces: {max-spaces-inside: 1}, truthy: {allowed-values: ["true", "false"]}}}"""


def checks() -> dict[str, list[list[str]]]:
    """Tool -> its command lines."""
    shell = [str(path) for path in sorted(ROOT.glob("*/*.sh")) + sorted(ROOT.glob("examples/**/*.sh"))]
    manifests = [str(path) for path in sorted(KUBERNETES.glob("base/*.yaml")) if path.stem != "kustomization"]
    overlays = [path.parent for path in sorted(KUBERNETES.glob("**/kustomization.yaml"))]
    return {
        "hadolint": [["hadolint", str(DOCKER / "Dockerfile")]],
        "yamllint": [["yamllint", "--strict", "-d", YAML_RULES, str(DOCKER)]],
        "shellcheck": [["shellcheck", str(ROOT / ".ci" / "run"), *dict.fromkeys(shell)]],
        "check-jsonschema": [
            ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yml")]
        ],
        "kubernetes-validate": [[*VALIDATE, *manifests]],
        "kubectl": [["kubectl", "kustomize", str(folder)] for folder in overlays],
        "promtool": [["promtool", "check", "config", str(DOCKER / "prometheus" / "prometheus.yml")]],
    }


WHERE = {"kubectl": "Kubernetes' own packages, or npm: kubectl", "promtool": "Debian: prometheus"}


def valid(manifests: str) -> bool:
    """What kubernetes-validate, where it is there, says of an overlay; and of the pods of its LeaderWorkerSets."""
    if shutil.which(VALIDATE[0]) is None:
        return True
    return all(
        subprocess.run([*VALIDATE, "/dev/stdin"], input=text, text=True).returncode == 0
        for text in (manifests, *pods(manifests))
    )


def pods(manifests: str) -> list[str]:
    """The pod templates of LeaderWorkerSets, which have no schema here, as pods, which have one."""
    import yaml  # comes with kubernetes-validate

    found = []
    for document in yaml.safe_load_all(manifests):
        if document["kind"] == "LeaderWorkerSet":
            templates = document["spec"]["leaderWorkerTemplate"]
            for name in ("leaderTemplate", "workerTemplate"):
                template = templates[name]
                metadata = {**template["metadata"], "name": name.lower()}
                found.append(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}))
    return found


def main() -> None:
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where pip puts the linters
    failed, missing = [], []
    for tool, commands in checks().items():
        if shutil.which(tool) is None:
            missing.append(f"{tool} ({WHERE.get(tool, 'pip, by make lint-deploy')})")
            continue
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                failed.append(tool)
                print(f"--- {' '.join(command)}\n{result.stdout}{result.stderr}")
            elif tool == "kubectl" and not valid(result.stdout):
                failed.append("kubernetes-validate")
    print("found something: " + ", ".join(dict.fromkeys(failed)) if failed else "found nothing")
    print("not checked, for they are missing: " + (", ".join(missing) or "none"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
