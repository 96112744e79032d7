"""SpecialTokens says which tokens have a name (`bos_token`, `image_token`, ...), by a model folder's files.

Two files name them, tokenizer_config.json and the older special_tokens_map.json. Which one is right where they differ
is transformers' rule (`PreTrainedTokenizerBase._from_pretrained`, 5.23): a config with `added_tokens_decoder` was
written by a version that needs no map, so the map is not read; without it, the map goes before the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_file

T = TypeVar("T")
Fields = dict[str, Any]

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNNAMED = ("additional_special_tokens", "extra_special_tokens")  # one list; the second is its name in transformers 5
MODEL_SPECIFIC = "model_specific_special_tokens"


class InvalidTokenizer(ConfigError):
    """A tokenizer file is broken: the message names the file and what is wrong with it."""


class Token(msgspec.Struct, frozen=True):
    """A token with the rules by which it is found in a text, as both files may write it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class SpecialTokens(msgspec.Struct, frozen=True):
    """The tokens that a model folder names.

    Attributes:
        named: the text of each token by its name; chat templates find them as variables.
        unnamed: the texts of further special tokens.
    """

    named: dict[str, str]
    unnamed: list[str]

    @classmethod
    def read(cls, folder: Path) -> SpecialTokens:
        """Read tokenizer_config.json and special_tokens_map.json, where they are.

        Raises:
            InvalidTokenizer: naming the file and the field that is none.
        """
        config = _fields(folder / "tokenizer_config.json")
        later = {} if "added_tokens_decoder" in config else _fields(folder / "special_tokens_map.json")
        # Of a model's own names, those that the config spells as texts are the exception: they go before the map's.
        texts = {name: token for name, token in _own_names(config).items() if isinstance(token, str)}
        kept = texts | _names_of(config, "extra_special_tokens") or _names_of(config, MODEL_SPECIFIC)
        named = _own_names(config | later) | kept | _names_of(later, "extra_special_tokens")
        standard = {name: (config | later).get(name) for name in STANDARD}
        lists = [fields[name] for fields in (config, later) for name in UNNAMED if isinstance(fields.get(name), list)]
        return cls(
            {name: _text(token) for name, token in {**standard, **named}.items() if token is not None},
            [_text(token) for token in (lists[0] if lists else [])],
        )


def read_optional_json(path: Path, kind: type[T]) -> T | None:
    """What a JSON file of a tokenizer holds; None where there is none. Raises: InvalidTokenizer, naming the file."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(read_file(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidTokenizer(f"{path}: {error}") from error


def _fields(path: Path) -> Fields:
    """The fields of one file that name tokens, each of the right type."""
    fields: Fields = read_optional_json(path, Fields) or {}
    types: dict[str, Any] = dict.fromkeys(STANDARD, str | Token | None)
    types[UNNAMED[0]] = list[str | Token] | None
    types[UNNAMED[1]] = list[str | Token] | dict[str, str | Token] | None
    types[MODEL_SPECIFIC] = dict[str, str | Token] | None
    for name in types.keys() & fields.keys():
        try:
            fields[name] = msgspec.convert(fields[name], types[name])
        except msgspec.ValidationError as error:
            raise InvalidTokenizer(f"{path}: {error} - at `$.{name}`") from error
    return fields


def _own_names(fields: Fields) -> Fields:
    """A model's own tokens, which are fields as the standard ones are; `add_bos_token` is a field of another kind."""
    found = {name: value for name, value in fields.items() if name.endswith("_token") and name not in STANDARD}
    return {name: value for name, value in found.items() if isinstance(value, str) or _is_token(value)}


def _is_token(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _names_of(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    return value if isinstance(value, dict) else {}


def _text(token: str | Token | Mapping[str, Any]) -> str:
    if isinstance(token, Mapping):
        return str(token["content"])
    return token if isinstance(token, str) else token.content
