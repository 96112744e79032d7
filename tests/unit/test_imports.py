"""Imports flow one way, as the contracts in pyproject.toml say; tests may import benchmarks, and not the reverse."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import grimp
import pytest
from support.places import ROOT

# In a process of its own: import-linter 2.16 configures logging, which silences every logger that exists by then.
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
# What pytest's pythonpath makes importable by a bare name.
OF_TESTS = {path.stem for path in (ROOT / "tests").iterdir()} | {"tests"}


def test_every_contract_is_kept():
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert linted.returncode == 0, linted.stdout
    assert "0 broken" in linted.stdout


def test_no_module_imports_itself_in_a_circle():
    """Imports for type checkers alone count too."""
    packages = ("benchmarks", "nanoflow_backend", "nanoflow_kernels", "nanoflow_search")
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 500, "the graph has imports"
    TopologicalSorter(imports).prepare()  # CycleError names the circle


def imported(source: str) -> Iterator[str]:
    """The first words of all modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_benchmarks_import_nothing_of_the_tests():
    files = [path for path in (ROOT / "benchmarks").rglob("*.py") if "tests" not in path.parts[len(ROOT.parts) :]]
    assert len(files) > 30
    found = {
        f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported(path.read_text()) if name in OF_TESTS
    }
    assert found == set()


@pytest.mark.parametrize(
    "line", ["import support.places", "from tests.support import x", "def f():\n    from support import waiting"]
)
def test_an_import_of_the_tests_is_seen(line):
    assert set(imported(line)) & OF_TESTS
