"""Pack a Python environment for the server's EXECUTION_ENV_PATH: a tar.gz that works wherever it is unpacked.

    python3 docker/pack_environment.py nanoflow-env.tar.gz              # what the stub needs: no torch, some 40 MB
    python3 docker/pack_environment.py nanoflow-env.tar.gz --extra gpu  # the engine too, several gigabytes

Run it with the Python of the server's image, in the image: the environment links to this interpreter by its path.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# venv's own script has the path of the environment in it.
ACTIVATE = """\
VIRTUAL_ENV="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PATH="$VIRTUAL_ENV/bin:$PATH"
export VIRTUAL_ENV PATH
unset PYTHONHOME
"""


def pack(environment: Path, output: Path) -> None:
    """Write a virtual environment as a tar.gz with relative paths. Its `bin/activate` becomes one that can be moved."""
    (environment / "bin" / "activate").write_text(ACTIVATE)
    with tarfile.open(output, "w:gz", compresslevel=1) as tar:  # unpacked at each load: time matters, not size
        tar.add(environment, arcname=".", filter=without_caches)


def without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if os.path.basename(member.name) == "__pycache__" else member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--extra", action="append", default=[], help="an extra of this project, e.g. gpu; repeatable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment, symlinks=True, with_pip=True)
        extras = f"[{','.join(arguments.extra)}]" if arguments.extra else ""
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        pip = [str(environment / "bin" / "python"), "-m", "pip", "--quiet", "install"]
        subprocess.run([*pip, *constraints, f"{ROOT}{extras}"], check=True)
        pack(environment, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.0f} MB, for {os.path.realpath(sys.executable)}")


if __name__ == "__main__":
    main()
