"""Which special tokens are put around a prompt, by the tokenizer's class, beside what transformers does."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from benchmarks.models.tiny_tokenizers import bytes_only
from nanoflow_backend.text.tokenizer import Tokenizer

POST_PROCESSORS = {"none": "a", "bos": "Ba", "both": "BaE"}  # and what each makes of "a"
SETTINGS = list(product((None, True, False), (None, True, False)))  # add_bos_token, add_eos_token
CLASSES_OF_THE_FILE = ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2TokenizerFast")
# As transformers 4.57.6 answered, run on the same folders, whatever the post-processor of the file.
LLAMA = {None: "Ba", True: "Ba", False: "a"}
GPT_NEOX = {None: "a", True: "Ba", False: "a"}
CLASSES = {
    "LlamaTokenizer": LLAMA,
    "LlamaTokenizerFast": LLAMA,
    "CodeLlamaTokenizer": LLAMA,
    "GemmaTokenizerFast": LLAMA,
    "CohereTokenizerFast": LLAMA,
    "GPTNeoXTokenizerFast": GPT_NEOX,
}


def make(folder: Path, post_processor: str, model_type: str = "llama", **config: object) -> Path:
    bytes_only(folder, extra=["<s>"])
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "<end>")]
    if post_processor != "none":
        single = "<s> $A" if post_processor == "bos" else "<s> $A <end>"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    given = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<end>", **given}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False).replace("<s>", "B").replace("<end>", "E")


@pytest.mark.parametrize("name", CLASSES_OF_THE_FILE)
def test_other_classes_do_as_the_file_says_whatever_the_settings(tmp_path: Path, name: str) -> None:
    """As transformers 4.57.6 did too."""
    for number, (post, (bos, eos)) in enumerate(product(POST_PROCESSORS, SETTINGS)):
        folder = make(tmp_path / str(number), post, tokenizer_class=name, add_bos_token=bos, add_eos_token=eos)
        tokenizer, reference = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode("a") == reference("a").input_ids
        assert shown(tokenizer, tokenizer.encode("a")) == POST_PROCESSORS[post]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_with_a_post_processor_of_their_own_do_as_transformers_4(tmp_path: Path, name: str) -> None:
    for number, (post, (bos, eos)) in enumerate(product(POST_PROCESSORS, SETTINGS)):
        folder = make(tmp_path / str(number), post, tokenizer_class=name, add_bos_token=bos, add_eos_token=eos)
        tokenizer = Tokenizer.from_pretrained(folder)
        assert shown(tokenizer, tokenizer.encode("a")) == CLASSES[name][bos] + ("E" if eos else "")
        assert shown(tokenizer, tokenizer.encode("<s>a")).count("B") == 1
        assert shown(tokenizer, tokenizer.encode("a", add_special_tokens=False)) == "a"


@pytest.mark.parametrize(
    ("model_type", "settings", "text"),
    [
        ("llama", {}, "a"),  # as transformers 5; version 4 guessed a Llama class
        ("llama", {"add_bos_token": True}, "Ba"),
        ("mixtral", {"add_eos_token": True}, "BaE"),
        ("mistral", {"add_bos_token": True}, "Ba"),
        ("phi3", {"add_bos_token": True}, "Ba"),
        ("qwen2", {"add_bos_token": True}, "a"),
        ("qwen3", {"add_bos_token": True}, "a"),
    ],
)
def test_without_a_class_the_settings_count_for_models_of_llamas_kind(
    tmp_path: Path, model_type: str, settings: dict[str, bool], text: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, "none", model_type, **settings))
    assert shown(tokenizer, tokenizer.encode("a")) == text


def test_a_class_whose_tokens_the_vocabulary_lacks_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    folder = make(tmp_path, "bos")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert shown(tokenizer, tokenizer.encode("a")) == "Ba"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert shown(tokenizer, tokenizer.encode("a")) == "Ba", "its class knows <s>"
