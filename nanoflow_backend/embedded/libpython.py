"""libpython finds the shared library of the running Python: the server's stub needs it, an interpreter may not.

`python -m nanoflow_backend.embedded.libpython` says what is missing, before anything is installed.
"""

import sys
import sysconfig
from pathlib import Path

LIBPYTHON = f"libpython3.{sys.version_info.minor}.so.1.0"


def libpython() -> Path:
    """Return the path of this Python's shared library; FileNotFoundError says how to get one."""
    libdir, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH")
    # The interpreter's own first; the distribution's has the same ABI and serves a statically linked interpreter.
    folders = [Path(libdir), Path(libdir, multiarch), Path(sys.base_prefix, "lib"), Path("/usr/lib", multiarch)]
    for folder in folders:
        if (folder / LIBPYTHON).exists():
            return folder / LIBPYTHON
    raise FileNotFoundError(
        f"{LIBPYTHON} is in none of {', '.join(map(str, dict.fromkeys(folders)))}: "
        f"apt install {LIBPYTHON.removesuffix('.so.1.0')}, or build Python with --enable-shared"
    )


if __name__ == "__main__":
    try:
        libpython()
    except FileNotFoundError as missing:
        sys.exit(str(missing))
