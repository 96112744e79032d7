"""Files of JSON lines, for tests of batches."""

import json
from pathlib import Path


def write_lines(path: Path, lines: list) -> Path:
    """Each line an object, or bytes that go in as they are."""
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
