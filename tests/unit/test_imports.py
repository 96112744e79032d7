"""Imports flow one way, as the contracts in pyproject.toml say."""

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
# In a process of its own: import-linter 2.16 configures logging, which silences every logger that exists by then.
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_every_contract_is_kept():
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert linted.returncode == 0, linted.stdout
    assert "0 broken" in linted.stdout


def test_no_module_imports_itself_in_a_circle():
    """Imports for type checkers alone count too."""
    packages = ("nanoflow_backend", "nanoflow_kernels", "nanoflow_search")
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=False, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imported.values())) > 500, "the graph has imports"
    TopologicalSorter(imported).prepare()  # CycleError names the circle
