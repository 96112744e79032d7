"""ARCHITECTURES lists the model families: a new one is a file in this folder and a line here."""

from __future__ import annotations

from nanoflow_backend.models.llama import LLAMA
from nanoflow_backend.models.mixtral import MIXTRAL
from nanoflow_backend.models.qwen2 import QWEN2

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        QWEN2,
        MIXTRAL,
    )
}
