"""TokenBytes knows what each token adds to the text, as bytes, whatever stands around it.

The decoders of today's language models work token by token: ByteLevel (GPT-2, Llama-3, Qwen2, DeepSeek) writes each
token's bytes one after the other, SentencePiece's (Llama-2, Mixtral: Replace, ByteFallback, Fuse, Strip) writes "▁" as
a space and "<0xE2>" as a byte; only the very first token is special, it loses the space the encoder put before it. So
a token's bytes are looked up once and for all, and streaming is a lookup and an incremental UTF-8 decoder.
(`tokenizers.decoders.DecodeStream` is as fast, but has no end, so that what is incomplete there is lost, and it raises
"Invalid prefix" on malformed byte tokens: on most random ids of a Llama-2-shaped tokenizer.)
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

ONE_PER_BYTE = "nanoflow_one_per_byte"  # ByteFallback shows each stray byte as U+FFFD, not each broken sequence


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(ONE_PER_BYTE, _one_per_byte)


class UnsupportedDecoder(ValueError):
    """A tokenizer's `decoder` is none of those that work token by token."""


class Decoding(msgspec.Struct, frozen=True):
    """The `decoder` of a tokenizer.json as functions of one token."""

    to_bytes: Callable[[str], bytes]
    first: Callable[[bytes], bytes] = bytes  # what is left of the first token of a text
    errors: str = ONE_PER_BYTE  # how malformed UTF-8 is decoded

    @classmethod
    def of(cls, spec: dict[str, Any] | None) -> Decoding:
        """Read the `decoder` entry of a tokenizer.json.

        Raises:
            UnsupportedDecoder: naming its parts.
        """
        if spec is None:  # the library's default: tokens joined by spaces
            return cls(lambda token: b" " + token.encode(), first=lambda piece: piece[1:])
        steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(_byte_level, errors="replace")
        if kinds == ["Metaspace"]:
            mark = steps[0]["replacement"]
            stripped = steps[0].get("prepend_scheme", "always") != "never"
            return cls(
                lambda token: token.replace(mark, " ").encode(),
                first=(lambda piece: piece.replace(b" ", b"")) if stripped else bytes,
            )
        if re.fullmatch("(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{kind} " for kind in kinds)):
            replacements = [(_literal(step), step["content"]) for step in steps if step["type"] == "Replace"]
            fallback = "ByteFallback" in kinds

            def to_bytes(token: str) -> bytes:
                for old, new in replacements:
                    token = token.replace(old, new)
                if fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                    return bytes.fromhex(token[3:5])
                return token.encode()

            return cls(to_bytes, first=_strip(steps[-1]) if "Strip" in kinds else bytes)
        raise UnsupportedDecoder(
            f"decoder: expected ByteLevel, Metaspace or Replace, ByteFallback, Fuse, Strip; got {kinds}"
        )


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, looked up when first asked for; no bytes for `hidden` ids and those without a token."""

    def __init__(
        self, backend: Backend, decoding: Decoding, vocab_size: int, hidden: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.decoding = decoding
        self._backend = backend
        self._vocab_size = vocab_size
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocab_size:  # not remembered: clients can send any number
            return b""
        token = None if token_id in self._hidden else self._backend.id_to_token(token_id)
        piece = self[token_id] = b"" if token is None else self.decoding.to_bytes(token)
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes: themselves where printable, else the next free of U+0100.."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _literal(replace: dict[str, Any]) -> str:
    pattern = replace["pattern"]
    if "String" not in pattern:
        raise UnsupportedDecoder(f"decoder: expected a Replace of a literal string, got {pattern}")
    return str(pattern["String"])


def _strip(strip: dict[str, Any]) -> Callable[[bytes], bytes]:
    if strip["start"] > 1 or strip["stop"] != 0:
        raise UnsupportedDecoder(f"decoder: expected a Strip of at most one leading character, got {strip}")
    leading = strip["content"].encode() * strip["start"]
    return lambda piece: piece.removeprefix(leading)
