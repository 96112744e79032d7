"""Real servers for tests: `server(model_repository=..., **options)` starts one that lives until the session ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from benchmarks.server import DEMO_MODEL, add_model
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.engine import LLM

# The server looks once a second whether its models have unloaded; two looks were needed for one model.
EXIT_TIMEOUT_S = 5


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
    """The demo model behind the drop-in folder, as `nanoflow`, and with `decoupled: false`, as `unary`."""
    repository = tmp_path_factory.mktemp("demo")
    for name, decoupled in (("nanoflow", "true"), ("unary", "false")):
        config = add_model(repository, DEMO_MODEL, name=name) / "config.pbtxt"
        config.write_text(config.read_text().replace("decoupled: true", f"decoupled: {decoupled}"))
    return server(repository, log=repository.parent / "demo.log")


@pytest.fixture(scope="session")
def demo_llm() -> LLM:
    """What the demo model says, without a server."""
    return LLM.from_pretrained(DEMO_MODEL)
