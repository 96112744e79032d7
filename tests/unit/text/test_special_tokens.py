"""Which tokens have names, against transformers, on folders whose two files name tokens in every way they can."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nanoflow_backend.text.special_tokens import InvalidTokenizer, SpecialTokens

WORDS = [f"<{letter}>" for letter in "abcdefgh"]
NAMES = ("bos_token", "eos_token", "pad_token", "image_token", "audio_token")
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _folder(folder: Path, config: dict[str, Any], names: dict[str, Any] | None) -> Path:
    folder.mkdir()
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, "q"])}, unk_token="q"))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if names is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def _named(rng: random.Random, of_config: bool) -> dict[str, Any]:
    def token() -> Any:
        word = rng.choice(WORDS)
        marked = {"__type": "AddedToken"} if of_config else {}
        return word if rng.random() < 0.7 else {**FLAGS, **marked, "content": word}

    fields = {name: token() for name in NAMES if rng.random() < 0.5}
    if of_config and rng.random() < 0.3:
        fields["model_specific_special_tokens"] = {"image_token": rng.choice(WORDS), "video_token": rng.choice(WORDS)}
    if rng.random() < 0.3:
        fields["extra_special_tokens"] = {"audio_token": rng.choice(WORDS)}
    if rng.random() < 0.2:
        fields["sep_token"] = None
    return fields


@pytest.mark.parametrize("seed", range(40))
def test_names_are_those_that_transformers_reads(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = {**_named(rng, True), "add_bos_token": True}
    if rng.random() < 0.3:
        config["added_tokens_decoder"] = {"0": {**FLAGS, "content": WORDS[0], "special": True}}
    folder = _folder(tmp_path / "model", config, _named(rng, False) if rng.random() < 0.8 else None)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    assert SpecialTokens.read(folder).named == reference.special_tokens_map


def test_a_folder_without_either_file_names_none(tmp_path: Path) -> None:
    assert SpecialTokens.read(tmp_path) == SpecialTokens({}, [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"eos_token": 2}, r"special_tokens_map\.json: Expected .*eos_token"),
        ({"eos_token": {"text": "<a>"}}, r"special_tokens_map\.json: .*missing required field `content`.*eos_token"),
        ({"additional_special_tokens": [1]}, r"special_tokens_map\.json: Expected .*additional_special_tokens"),
        ({"extra_special_tokens": "<a>"}, r"special_tokens_map\.json: Expected .*extra_special_tokens"),
    ],
)
def test_what_is_no_token_is_named(tmp_path: Path, names: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTokenizer, match=message):
        SpecialTokens.read(_folder(tmp_path / "model", {}, names))
