"""The README's figures are those of benchmarks/results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_one_that_the_results_make():
    check = [sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"]
    assert subprocess.run(check).returncode == 0, "run benchmarks/readme_table.py"
