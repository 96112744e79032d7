"""Framing is the special tokens that a tokenizer puts before and after a prompt.

tokenizer.json says so in its post-processor. Some classes of transformers up to version 4 (4.57.6 was compared) replace
that one by their own, as `add_bos_token` and `add_eos_token` of tokenizer_config.json ask; other classes, and all of
version 5, ignore these settings. Checkpoints that name such a class were trained and tested with it, so here it is
obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from nanoflow_backend.text.special_tokens import read_optional_json

LLAMA_MODELS = ("llama", "mistral", "mixtral", "phi3")  # version 4 takes the Llama class for them, where none is named


class TokenizerFamily(NamedTuple):
    """A class that makes its own post-processor, and what it takes where a folder says nothing."""

    adds_bos: bool
    bos: str
    eos: str


FAMILIES = {
    "CodeLlama": TokenizerFamily(True, "<s>", "</s>"),
    "Cohere": TokenizerFamily(True, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "Gemma": TokenizerFamily(True, "<bos>", "<eos>"),
    "GPTNeoX": TokenizerFamily(False, "<|endoftext|>", "<|endoftext|>"),
    "Llama": TokenizerFamily(True, "<s>", "</s>"),
}


class _Settings(msgspec.Struct, frozen=True):
    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


class _ModelConfig(msgspec.Struct):
    model_type: str | None = None


class Framing(msgspec.Struct, frozen=True):
    """What a class puts around prompts, instead of what tokenizer.json says.

    Attributes:
        bos, eos: the text of the token; None where it is not added.
    """

    bos: str | None
    eos: str | None

    @classmethod
    def read(cls, folder: Path, named: Mapping[str, str]) -> Framing | None:
        """Read tokenizer_config.json, and config.json where the former names no class.

        Args:
            named: the folder's special tokens by name.

        Returns:
            None where tokenizer.json alone decides.

        Raises:
            InvalidTokenizer: naming the file and the field.
        """
        settings = read_optional_json(folder / "tokenizer_config.json", _Settings) or _Settings()
        name = settings.tokenizer_class
        if name is None:  # version 4 goes by the model then; version 5 does not, so it must have been asked for
            if settings.add_bos_token is None and settings.add_eos_token is None:
                return None
            config = read_optional_json(folder / "config.json", _ModelConfig)
            name = "Llama" if config is None or config.model_type in LLAMA_MODELS else ""
        family = FAMILIES.get(name.removesuffix("Fast").removesuffix("Tokenizer"))
        if family is None:
            return None
        adds_bos = family.adds_bos if settings.add_bos_token is None else settings.add_bos_token
        return cls(
            bos=named.get("bos_token", family.bos) if adds_bos else None,
            eos=named.get("eos_token", family.eos) if settings.add_eos_token else None,
        )

    def apply(self, backend: Backend) -> None:
        """Replace the post-processor, unless the vocabulary lacks a token: then the file's own stays."""
        before = [] if self.bos is None else [self.bos]
        after = [] if self.eos is None else [self.eos]
        ids = {token: backend.token_to_id(token) for token in (*before, *after)}
        if None not in ids.values():
            backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
                special_tokens=list(ids.items()),
            )
