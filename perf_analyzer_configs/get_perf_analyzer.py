"""Put the real perf_analyzer next to the running Python: `.venv/bin/python perf_analyzer_configs/get_perf_analyzer.py`.

The binary is in the tritonclient 2.51.0 wheel; the two libraries that a plain Debian lacks are among those that
nvidia-pytriton bundles, under other names.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "tritonclient==2.51.0"
BINARY = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def install(prefix: Path, bundled: Path) -> Path:
    """Write PREFIX/libexec/perf_analyzer/ and the launcher PREFIX/bin/perf_analyzer; return the launcher."""
    libexec, launcher = prefix / "libexec" / "perf_analyzer", prefix / "bin" / "perf_analyzer"
    libexec.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--platform=manylinux1_x86_64", f"--dest={download}", WHEEL], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (libexec / "perf_analyzer").write_bytes(archive.read(BINARY))
    for name, pattern in LIBRARIES.items():
        (library,) = bundled.glob(pattern)
        (libexec / name).unlink(missing_ok=True)
        (libexec / name).symlink_to(library)
    search_path = f"{libexec}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
    launcher.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{search_path}" exec "{libexec}/perf_analyzer" "$@"\n')
    for executable in (launcher, libexec / "perf_analyzer"):
        executable.chmod(0o755)
    return launcher


if __name__ == "__main__":
    pytriton = importlib.util.find_spec("pytriton")
    if pytriton is None or pytriton.origin is None:
        sys.exit("nvidia-pytriton is not installed: pip install 'nanoflow-triton[server]'")
    perf_analyzer = install(Path(sys.prefix), Path(pytriton.origin).parents[1] / "nvidia_pytriton.libs")
    sys.exit(subprocess.run([perf_analyzer, "--version"]).returncode)
