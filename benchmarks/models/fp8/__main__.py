"""`python -m benchmarks.models.fp8 TOOL FOLDER`: see tools.py."""

import argparse
from pathlib import Path

from benchmarks.models.fp8.tools import TOOLS

parser = argparse.ArgumentParser(prog="python -m benchmarks.models.fp8", description="Make tiny FP8 checkpoints.")
parser.add_argument("tool", choices=TOOLS, help="its packages must be installed beside torch and transformers")
parser.add_argument("folder", type=Path, help="gets a folder for each checkpoint")
arguments = parser.parse_args()
TOOLS[arguments.tool][0](arguments.folder)
