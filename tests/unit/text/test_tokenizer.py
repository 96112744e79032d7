"""Tokenizer against transformers on the same files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from benchmarks.models.tiny_tokenizers import SHAPES, bytes_only, deepseek, llama2, llama3, qwen2
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.special_tokens import InvalidTokenizer
from nanoflow_backend.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, two trailing  ",
    "line\r\n\n\tindented   by  many",
    "It's 1234567 o'clock, señor",
    "cafe\u0301 vs café",  # combining, which NFC joins
    "👩‍👩‍👧‍👦 🏳️‍🌈 你好\uff0c世界 \u200d\u200b\x00\x07\ufffd",
    "<s>▁<0x0A></s>",
    "<|im_start|>user <|eot_id|> <tool_call>",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(TEXTS), max_size=4).map("".join))


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SHAPES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(text=texts)
def test_ids_and_text_are_those_of_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == reference(text, add_special_tokens=False).input_ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_random_ids_decode_as_in_transformers(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    assert tokenizer.vocab_size == len(reference)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(20))]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_those_of_transformers(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    assert tokenizer.special_tokens == dict(reference.special_tokens_map)
    assert set(reference.all_special_ids) <= tokenizer.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)


def test_token_texts_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).lstrip() == "The quick brown fox"
    assert tokenizer.token_text(10**6) == ""


@pytest.mark.parametrize("shape", [llama3, llama2, deepseek])
def test_exactly_one_bos(tmp_path: Path, shape: object) -> None:
    tokenizer = Tokenizer.from_pretrained(shape(tmp_path))  # type: ignore[operator]
    bos, bos_id = tokenizer.special_tokens["bos_token"], tokenizer.bos_id
    for text in ("Hello", "", bos + "Hello", bos):
        ids = tokenizer.encode(text)
        assert [index for index, token_id in enumerate(ids) if token_id == bos_id] == [0]
    assert bos_id not in tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode(bos + "Hello", add_special_tokens=False) == tokenizer.encode(bos + "Hello")


def test_no_bos_where_the_model_has_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(qwen2(tmp_path))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)


def test_truncation_of_the_file_is_not_applied(tmp_path: Path) -> None:
    file = llama2(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    assert len(Tokenizer.from_pretrained(tmp_path).encode("one two three four five six")) > 4


@pytest.mark.parametrize("list_name", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_of_the_config(tmp_path: Path, list_name: str) -> None:
    """One that only its name makes special, two that only the config knows; special_tokens_map.json is not read."""
    file = qwen2(tmp_path) / "tokenizer_config.json"
    end = Tokenizer.from_pretrained(tmp_path).vocab_size
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {str(end): {**token, "content": "<new>", "special": False}},
        "eos_token": "<tool_call>",
        list_name: ["<|im_start|>", "<extra>"],
    }
    file.write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {**token, "content": "<|im_start|>"}}))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    text = "a<tool_call>b<new>c<extra>d"
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert {end, end + 1} <= set(ids)
    assert tokenizer.decode(ids) == "ab<new>cd"
    assert tokenizer.special_tokens == {"eos_token": "<tool_call>"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"eos_token": "<tool_call>"}, "ab"),
        ({"extra_special_tokens": {"image_token": "<tool_call>"}}, "ab"),
        ({"additional_special_tokens": ["<tool_call>"]}, "a<tool_call>b"),  # tokenizer.json says it is not special
    ],
)
def test_a_name_makes_a_token_special(tmp_path: Path, config: dict[str, object], text: str) -> None:
    (qwen2(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("a<tool_call>b")
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == text


def test_a_lone_surrogate_is_the_callers_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="prompt: expected valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidTokenizer, match=r"expected a tokenizer\.json$"):
        Tokenizer.from_pretrained(tmp_path)
    assert Tokenizer.find(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "vocab.json"])
def test_another_kind_of_tokenizer_alone_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InvalidTokenizer, match=rf"found {name} only; to make one, .*\.save_pretrained\('{tmp_path}'\)"):
        Tokenizer.find(tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"pad_token": "<pad>"}, "ab<x>c"),
        ({"additional_special_tokens": ["<x>"]}, "a<pad>bc"),  # as 4.57; transformers 5 does not look at the list
        ({}, "a<pad>b<x>c"),
    ],
)
def test_tokens_of_an_older_folder(tmp_path: Path, names: dict[str, object], text: str) -> None:
    """added_tokens.json and special_tokens_map.json, as they were before there was an added_tokens_decoder."""
    bytes_only(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 258, "<pad>": 257, "<end>": 256}))
    reference, tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("a<pad>b<x>c")
    assert ids == reference("a<pad>b<x>c").input_ids
    assert {257, 258} <= set(ids)
    assert tokenizer.decode(ids) == text
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 300}))
    with pytest.raises(InvalidTokenizer, match=r"added_tokens\.json: expected id 257 for '<pad>'.*got 300"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file = llama3(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["processors"][1]["special_tokens"] = {}  # though the template before names one
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidTokenizer, match=r"tokenizer\.json: not a valid tokenizer: it contradicts itself"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a valid tokenizer"),
        ("tokenizer.json", '{"decoder": null}', r"tokenizer\.json: not a valid tokenizer"),
        ("tokenizer.json", '{"decoder": {"type": "WordPiece"}}', r"decoder: expected ByteLevel.*got \['WordPiece'\]"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: Expected `object`"),
        ("tokenizer_config.json", '{"bos_token": 1}', r"tokenizer_config\.json: Expected .*bos_token"),
        ("chat_template.jinja", "{% if %}", "chat template, line 1"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: expected UTF-8"),
        ("chat_template.jinja", "{{ " + "9" * 5000 + " }}", "chat template: cannot be compiled: Exceeds the limit"),
        ("chat_template.jinja", "{% for a in b %}" * 40 + "{% endfor %}" * 40, "chat template: cannot be compiled"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
    (llama3(tmp_path) / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidTokenizer, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_text_is_torch_free() -> None:
    code = "import sys, nanoflow_backend.text.text_stream; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
