"""What docs/security.md promises of the source: no pickle, no code of a checkpoint, no socket with a name."""

import ast

import pytest
from support.places import ROOT

SHIPPED = sorted(
    path
    for folder in ("nanoflow_backend", "kernels", "search", "backends", "docker", "model_repository")
    for path in (ROOT / folder).rglob("*.py")
)
# Modules that unpickle, or run what they read.
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "copyreg",
    "runpy",
    "code",
}
# From `multiprocessing` only Connection, for its framed bytes.
CONNECTION = {"multiprocessing.connection.Connection"}
CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "numpy.load", "np.load", "os.system", "os.popen", "tempfile.mktemp", "yaml.load",
}  # fmt: skip
METHODS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
           "recv_object_list", "send_pyobj", "recv_pyobj", "load_state_dict_from_url", "map_async",
           "apply_async"}  # fmt: skip
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}


def dotted(node):
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}"
    return ""


def faults(source):
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported = {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names):
                imported = {f"{module}.{alias.name}" for alias in names}
            case ast.Call(func=function, keywords=keywords):
                name = dotted(function)
                if name in CALLS or name.rpartition(".")[2] in METHODS:
                    yield name
                yield from (keyword.arg for keyword in keywords if keyword.arg in KEYWORDS)
                continue
            case _:
                continue
        for name in imported:
            if name.split(".")[0] in MODULES or (name.startswith("multiprocessing") and name not in CONNECTION):
                yield name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_what_it_reads(path):
    assert not list(faults(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing",
        "from multiprocessing import Pool",
        "from multiprocessing.connection import Listener",
        "torch.load(path)",
        "dist.broadcast_object_list([x])",
        "socket.recv_pyobj()",
        "eval(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_check_sees(source):
    assert list(faults(source))


def test_connections_carry_bytes_only():
    """`Connection.send` and `recv` pickle; only their siblings for bytes are used on one."""
    child = ast.parse((ROOT / "nanoflow_backend" / "process" / "child.py").read_text())
    calls = {dotted(node.func) for node in ast.walk(child) if isinstance(node, ast.Call)}
    used = {name.rpartition(".")[2] for name in calls if name.startswith("self._connection.")}
    assert used == {"send_bytes", "recv_bytes", "fileno", "close", "poll"}


def test_no_socket_has_a_name():
    """Processes talk over socket pairs. Three bind: the embedded server's search for a free port, to loopback; what
    publishes KV events, where engine.json says so; and the leader of several hosts, at the address that it was told,
    where all must prove to have the secret."""
    binding = {"socket.socket.bind", "bind", "listen", "Listener", "create_server", "AF_UNIX"}
    binders = ("embedded/server.py", "kv_events/publisher.py", "hosts/gathering.py")
    for path in SHIPPED:
        names = {dotted(node).rpartition(".")[2] for node in ast.walk(ast.parse(path.read_text()))}
        assert not names & binding or any(path.match(binder) for binder in binders), path
