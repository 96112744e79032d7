"""EmbeddedServer runs the real tritonserver that the nvidia-pytriton wheel brings, without pytriton's Python layer.

Everything of one server lives in a private folder (mostly links into the wheel, nothing is written there):

    backends/           the Python backend, with the stub for the running Python put in place; links to others
    python/             a virtual environment whose path leads to the packages of this process
    lib/                the shared library of the running Python, and nothing else

The stub ignores PYTHONPATH and finds its packages through the `python3` that is first on PATH. Giving it an environment
of its own, with the source folders of the *imported* packages first, makes the server (and an engine process that it
starts) run the code of this process: an installed one, an editable one or a checkout that is not installed at all.
"""

import contextlib
import http.client
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from nanoflow_backend.embedded import log_lines
from nanoflow_backend.embedded.libpython import libpython

LOOPBACK = "127.0.0.1"
OWN_PACKAGES = ("nanoflow_backend", "nanoflow_kernels")
# The server waits exit_timeout_s for its models; with one that never unloads it ended less than 1 s after that.
SHUTDOWN_MARGIN_S = 5.0


class ServerError(RuntimeError):
    """The embedded server cannot start, is not ready, or ended; the message says what to do or what it logged."""


class EmbeddedServer:
    """The real tritonserver from the nvidia-pytriton wheel, on loopback: for demos, tests and laptops, not production.

    `backends` is a folder of Python-based backends: each subfolder is one, with its model.py, named by `backend` in a
    config.pbtxt. A port of 0 picks a free one. `arguments` go to tritonserver as they are, e.g.
    `["--model-control-mode=explicit"]`. `log` receives the server's output, behind what is in it; without one it is
    kept for error messages only. As a context manager it is ready inside; when the block, or this process, ends in
    whatever way, the server and all that it started end too.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        backends: Path | None = None,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log: Path | None = None,
        arguments: Sequence[str] = (),
        exit_timeout_s: int = 30,
        ready_timeout_s: float = 120.0,
    ) -> None:
        self.model_repository = model_repository
        self.backends = backends
        self.arguments = tuple(arguments)
        self.exit_timeout_s = exit_timeout_s
        self.ready_timeout_s = ready_timeout_s
        # Models of two servers on one machine must not meet in /dev/shm.
        self.shm_prefix = f"nanoflow-{os.getpid()}-{secrets.token_hex(4)}-"
        self._asked_ports = {"--http-port": http_port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
        self._ports = dict(self._asked_ports)
        self.log = log
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The root of the server's process tree; it ends after everything that the server started."""
        return self._running().pid

    @property
    def http_url(self) -> str:
        """host:port, as tritonclient takes it; known once started."""
        return f"{LOOPBACK}:{self._ports['--http-port']}"

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient takes it; known once started."""
        return f"{LOOPBACK}:{self._ports['--grpc-port']}"

    @property
    def metrics_url(self) -> str:
        """host:port of the Prometheus page /metrics; known once started."""
        return f"{LOOPBACK}:{self._ports['--metrics-port']}"

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready(self.ready_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return at once; ServerError names what is missing, taken or too new."""
        if self._guard is not None:
            raise ServerError("the server is already running")
        if not self.model_repository.is_dir():
            raise ServerError(f"model repository {self.model_repository} is not a folder")
        wheel = _wheel_folder()
        _check_numpy()
        self._ports = _free_ports(self._asked_ports)
        self._log_file = self.log.open("a+b") if self.log else tempfile.TemporaryFile()  # noqa: SIM115  stop() closes it
        self._log_start = self._log_read = os.fstat(self._log_file.fileno()).st_size
        runtime = _lay_out(wheel, self.backends)
        command = [
            str(wheel / "bin" / "tritonserver"),
            f"--model-repository={self.model_repository.resolve()}",
            f"--backend-directory={runtime / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            *(f"{option}={port}" for option, port in self._ports.items()),
            *(f"--{service}-address={LOOPBACK}" for service in ("http", "grpc", "metrics")),
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={self.exit_timeout_s}",
            *self.arguments,
        ]
        guard = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
        guard += [str(self.exit_timeout_s + SHUTDOWN_MARGIN_S), self.shm_prefix, str(runtime)]
        search_path = {
            "PATH": f"{runtime}/python/bin:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": f"{runtime}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        }
        self._guard = subprocess.Popen(
            guard + command,
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | search_path,
            cwd=runtime,  # the stub puts its working folder first on its path
            start_new_session=True,  # Ctrl-C is for this process, which then stops the server in order
        )

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when all models are loaded; ServerError, with the log's last lines, if one fails or it is late."""
        deadline_s = time.monotonic() + timeout_s
        while not self._is_ready():
            guard = self._running()
            if guard.poll() is not None:
                raise ServerError(f"the server ended with status {guard.returncode} before it was ready{self._tail()}")
            if time.monotonic() > deadline_s:
                raise ServerError(f"the server was not ready after {timeout_s:g} s{self._tail()}")
            time.sleep(0.05)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block while the server runs, for `timeout_s` at most; ServerError when it has ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._running().wait(timeout_s)
            raise ServerError(f"the server ended by itself with status {status}{self._tail()}")

    def new_warnings(self) -> list[str]:
        """Warnings and errors of our models, not the server's own, that came into the log since the last call."""
        text = self._logged(self._log_read)
        whole = text[: text.rfind(b"\n") + 1]
        self._log_read += len(whole)
        return log_lines.warnings(whole.decode(errors="replace"))

    def stop(self) -> None:
        """End the server: SIGTERM, the exit timeout, SIGKILL. No process, port or shared memory is left. Idempotent."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the guard has ended
            self._guard.stdin.write(b"stop\n")  # a forked child of this process may hold the pipe: do not rely on EOF
            self._guard.stdin.close()
        self._guard.wait()
        self._guard = None
        self._log_file.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._guard is None:
            raise ServerError("the server was not started")
        return self._guard

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self._ports["--http-port"], timeout=1)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == http.HTTPStatus.OK
            except (OSError, http.client.HTTPException):
                return False

    def _tail(self) -> str:
        """What the log says of an end: why a model of ours could not load, if it says that; else its last lines."""
        log = self._logged(self._log_start).decode(errors="replace")
        if causes := log_lines.failures(log):
            return f": {'; '.join(causes)}"
        name = f"its log {self.log}" if self.log else "its log"
        return "\n".join([f"; the last lines of {name}:", *log_lines.tail(log)])

    def _logged(self, start: int) -> bytes:
        descriptor = self._log_file.fileno()
        # pread: the server writes at the offset that it shares with us
        return os.pread(descriptor, os.fstat(descriptor).st_size - start, start)


def _wheel_folder() -> Path:
    """The tritonserver folder of the nvidia-pytriton wheel, found without importing it."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(f"nvidia-pytriton is not installed in {sys.prefix}: pip install 'nanoflow-triton[server]'")
    return Path(spec.origin).with_name("tritonserver")


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {version} is installed, but the embedded server (2.51) reads string tensors wrongly with "
            "numpy 2 and dies: pip install 'numpy<2'"
        )


def _free_ports(asked: Mapping[str, int]) -> dict[str, int]:
    """Map each option to a port that is free now: the one it asks for, or any for 0. ServerError names the option."""
    ports = dict(asked)
    with contextlib.ExitStack() as claims:
        for option, port in sorted(asked.items(), key=lambda item: item[1] == 0):  # 0 must not take an asked one
            claim = claims.enter_context(socket.socket())
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is free
            try:
                claim.bind((LOOPBACK, port))
                claim.listen()
            except (OSError, OverflowError) as reason:
                raise ServerError(
                    f"cannot listen on port {port} of {LOOPBACK} ({reason}): "
                    f"choose another with {option}, or {option} 0 for any free one"
                ) from None
            ports[option] = claim.getsockname()[1]
    return ports


def _lay_out(wheel: Path, backends: Path | None) -> Path:
    """Make the private folder that the head of this file describes; ServerError if something of it is missing."""
    python = f"3.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"nvidia-pytriton has no stub for Python {python}: {stub} does not exist")
    try:
        shared_library = libpython()
    except FileNotFoundError as missing:
        raise ServerError(str(missing)) from None
    python_path = _path_of_this_process()

    runtime = Path(tempfile.mkdtemp(prefix="nanoflow-server-"))
    backend, lib, environment = runtime / "backends" / "python", runtime / "lib", runtime / "python"
    backend.mkdir(parents=True)
    for file in (stub, *(wheel / "backends" / "python").glob("*.py")):
        (backend / file.name).symlink_to(file)
    # No link: to the other backends the server gives no library from outside this folder.
    shutil.copy(wheel / "backends" / "python" / "libtriton_python.so", backend)
    for folder in backends.resolve().iterdir() if backends else ():
        (runtime / "backends" / folder.name).symlink_to(folder)
    lib.mkdir()
    (lib / shared_library.name).symlink_to(shared_library)
    venv.create(environment, symlinks=True)
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
    Path(site_packages, "parent.pth").write_text("\n".join(python_path) + "\n")
    return runtime


def _path_of_this_process() -> list[str]:
    """The lines of a .pth file: the folders that hold our packages, then the site folders with their own .pth files."""
    lines = []
    for package in OWN_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ServerError(f"package {package} is neither installed nor on sys.path")
        lines.append(str(Path(spec.origin).parent.parent.resolve()))
    site_folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return lines + [f"import site; site.addsitedir({folder!r})" for folder in site_folders]
