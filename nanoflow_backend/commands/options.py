"""Options that several commands have. Nothing is imported for them but typer: --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Option(help="Hugging Face folder: config.json, safetensors, tokenizer.json.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of engine.json, e.g. --set dense_batch_tokens=256. Repeatable."),
]
Result = Annotated[Path | None, typer.Option(help="Where the whole result goes, as JSON; shown is a part of it.")]
InputTokens = Annotated[int, typer.Option(min=1)]
OutputTokens = Annotated[int, typer.Option(min=1)]
Requests = Annotated[int, typer.Option(min=1, help="How many; of a trace, drawn from all of it.")]
LengthsOfTrace = Annotated[
    Path | None, typer.Option(exists=True, help="CSV with ContextTokens and GeneratedTokens instead.")
]
LengthsOfDataset = Annotated[
    Literal["lmsys-like", "sharegpt-like"] | None, typer.Option(help="Lengths drawn as in this dataset instead.")
]
