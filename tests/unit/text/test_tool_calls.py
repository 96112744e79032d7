"""Tool calls are text: what a parser reads there, sent back as OpenAI's messages, is the same prompt again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from support.places import ROOT
from support.text.streamed_text import params
from tokenizers import Tokenizer as Backend

from benchmarks.accuracy.chat_templates import TOKENS
from benchmarks.accuracy.conversations import BARE, TOOL, Message, answer, result, user
from benchmarks.accuracy.random_conversations import random_call
from benchmarks.models.tiny_tokenizers import llama3
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.text.chat_template import ChatTemplate
from nanoflow_backend.text.text_stream import TextStream
from nanoflow_backend.text.tokenizer import Tokenizer

Calls = list[tuple[str, dict[str, Any]]]
SPECIAL = ["[TOOL_CALLS]", "<|python_tag|>", "<|im_start|>", "<|im_end|>", "</s>"]
ORDINARY = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # as in Qwen's vocabularies


def read_llama(text: str) -> tuple[str, Calls]:
    call = json.loads(text.removeprefix("<|python_tag|>"))
    return "", [(call["name"], call["parameters"])]


def read_mistral(text: str) -> tuple[str, Calls]:
    content, _, calls = text.partition("[TOOL_CALLS]")
    return content, [(call["name"], call["arguments"]) for call in json.loads(calls)]


def read_hermes(text: str) -> tuple[str, Calls]:
    calls = [json.loads(call) for call in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
    return text[: text.find("<tool_call>")], [(call["name"], call["arguments"]) for call in calls]


class Family(NamedTuple):
    end: str  # the token with which the model ends such an answer
    read: Callable[[str], tuple[str, Calls]]
    most_calls: int = 3
    reasons: bool = False


FAMILIES = {
    "llama3_1": Family("<|eot_id|>", read_llama, most_calls=1),
    "llama3_2": Family("<|eot_id|>", read_llama, most_calls=1),
    "mistral_nemo": Family("</s>", read_mistral),
    "qwen2_5": Family("<|im_end|>", read_hermes),
    "qwen3_instruct_2507": Family("<|im_end|>", read_hermes),
    "qwen3_first": Family("<|im_end|>", read_hermes, reasons=True),
    "qwen3": Family("<|im_end|>", read_hermes, reasons=True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = llama3(tmp_path_factory.mktemp("tools")) / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ORDINARY)
    backend.save(str(file))
    return Tokenizer.from_pretrained(file.parent)


def published(name: str) -> ChatTemplate:
    folder: Path = ROOT / "tests" / "support" / "text" / "published"
    return ChatTemplate((folder / f"{name}.jinja").read_text(), TOKENS)


def streamed(tokenizer: Tokenizer, text: str, end: str, **fields: Any) -> str:
    """What a client sees of a text that the model writes token by token, and ends with a token of its own."""
    stream = TextStream(tokenizer, params(**fields), tokenizer.encode("...", add_special_tokens=False))
    ids = tokenizer.encode(text + end, add_special_tokens=False)
    assert tokenizer.token_text(ids[-1]) == end
    deltas = [Delta(0, (token_id,)) for token_id in ids[:-1]]
    deltas.append(Delta(0, (ids[-1],), finish_reason=FinishReason.STOP))
    return "".join(stream.push(delta).text for delta in deltas)


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_that_are_read_from_the_text_and_sent_back_are_the_same_prompt(name: str, tokenizer: Tokenizer) -> None:
    family, template, random = FAMILIES[name], published(name), Random(name)
    for _ in range(30):
        calls = [random_call(random, number) for number in range(random.randint(1, family.most_calls))]
        reasoning = {"reasoning_content": "Rain?\n\nI'll look."} if family.reasons else {}
        asked = [user("Is it raining?")]
        prompt = template.render(asked, [TOOL, BARE])
        whole = template.render([*asked, answer("", tool_calls=calls, **reasoning)], [TOOL, BARE], False)
        written = whole.removeprefix(prompt).partition(family.end)[0]
        assert prompt + written + family.end == whole.rstrip("\n")

        text = streamed(tokenizer, written, family.end, skip_special_tokens=False)
        assert text == written
        content, read = family.read(text)
        assert read == [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        results = [result("yes", tool_call_id=call["id"]) for call in calls]
        back = [*asked, answer(content or None, tool_calls=sent_back(calls, read)), *results]
        assert template.render(back, [TOOL, BARE]).startswith(whole)


def sent_back(calls: list[Message], read: Calls) -> list[Message]:
    """As OpenAI's clients do it: the arguments are a text of JSON."""
    functions = [{"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)} for name, arguments in read]
    return [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]


def test_marks_that_are_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    """As vLLM does it, whose parsers of Mistral's calls ask for them; the answer's end is left out in any case."""
    written = '[TOOL_CALLS][{"name": "now"}]'
    assert streamed(tokenizer, written, "</s>") == '[{"name": "now"}]'
    assert streamed(tokenizer, written, "</s>", skip_special_tokens=False) == written
    qwens = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "now"}\n</tool_call>'
    assert streamed(tokenizer, qwens, "<|im_end|>") == qwens
