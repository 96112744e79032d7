"""Real servers for tests: `server(model_repository=..., **options)` starts one that lives until the session ends."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.places import DEMO_MODEL, DROP_IN_FOLDER

from benchmarks.server import add_model
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.engine import LLM

HERE = Path(__file__).parent

# The server looks once a second whether its models have unloaded; two looks were needed for one model.
EXIT_TIMEOUT_S = 5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder starts the real server."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[..., EmbeddedServer]]:
    """A factory of ready servers; options are those of EmbeddedServer. A test may stop() its server earlier."""
    with ExitStack() as running:

        def start(model_repository: Path, **options: object) -> EmbeddedServer:
            settings = {"exit_timeout_s": EXIT_TIMEOUT_S, **options}
            return running.enter_context(EmbeddedServer(model_repository, **settings))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="session")
def process_tree() -> Callable[[int], dict[int, str]]:
    """A function: process id -> {id: command name} of the process and all that descend from it."""

    def tree(root: int) -> dict[int, str]:
        processes = {}
        with suppress(FileNotFoundError, ProcessLookupError):  # threads and processes end while we look
            processes[root] = Path(f"/proc/{root}/comm").read_text().strip()
            for task in Path(f"/proc/{root}/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    for child in (task / "children").read_text().split():
                        processes |= tree(int(child))
        return processes

    return tree


@pytest.fixture(scope="session")
def demo(server: Callable[..., EmbeddedServer], tmp_path_factory: pytest.TempPathFactory) -> EmbeddedServer:
    """The demo model behind the drop-in folder as it is, as `nanoflow`; with `decoupled: false` and only our metrics,
    as `unary`; and as a folder of the vLLM backend that reports its metrics, as `reporting`.
    """
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "demo").symlink_to(DEMO_MODEL.parent)
    repository = checkout / DROP_IN_FOLDER.parent.name
    shutil.copytree(DROP_IN_FOLDER, repository / "nanoflow")
    config = add_model(repository, DEMO_MODEL, name="unary") / "config.pbtxt"
    text = config.read_text().replace("decoupled: true", "decoupled: false")
    config.write_text(text + 'parameters { key: "metrics_dialects" value { string_value: "nanoflow" } }')
    with (add_model(repository, DEMO_MODEL, name="reporting") / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "True" } }')
    return server(repository, log=checkout / "log")


@pytest.fixture(scope="session")
def demo_llm() -> LLM:
    """What the demo model says, without a server."""
    return LLM.from_pretrained(DEMO_MODEL)
