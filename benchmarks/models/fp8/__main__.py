"""`python -m benchmarks.models.fp8 TOOL FOLDER`: see tools.py."""

import sys
from pathlib import Path

from benchmarks.models.fp8.tools import TOOLS

TOOLS[sys.argv[1]][0](Path(sys.argv[2]))
