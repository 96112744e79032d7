"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "demo" / "tiny-llama"
DROP_IN_FOLDER = ROOT / "model_repository" / "nanoflow"
MODELS = ROOT / "benchmarks" / "models"
LLAMA_3_8B = MODELS / "llama-3-8b"
