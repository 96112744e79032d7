"""The chat templates of a folder are rendered for many conversations by the engine and by transformers.

    make templates DIR=folder [OUTPUT=record.json] [OF="where they are from"]

reads every *.jinja file and every chat template of a tokenizer_config.json under the folder. Each meets the
conversations of `conversations.py` and random ones, which are the same in every run. The record has a header, what
became of all pairs of a template and a conversation (`OUTCOMES`), and each pair whose texts differ or that one side
alone refuses. Exits with 1 if the engine gives another text than transformers, or alone refuses a conversation.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated, Any

import transformers
import typer
from jinja2 import TemplateSyntaxError
from rich.progress import track
from transformers.utils.chat_template_utils import render_jinja_template

from benchmarks.accuracy.conversations import CONVERSATIONS, Conversation, Message
from benchmarks.accuracy.random_conversations import random_conversation
from nanoflow_backend.bench import result
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
OUTCOMES = {
    "equal": "the text is that of transformers' apply_chat_template",
    "equal in another form": "it is that of the same messages, with parts or a text, with JSON or an object,"
    " with nulls, or with reasoning under its third name",
    "both refuse": "neither renders the messages",
    "transformers refuses": "the engine alone renders them",
    "the engine refuses": "transformers alone renders them",
    "different": "two texts",
}
BAD = ("the engine refuses", "different")


def main(
    folder: Annotated[Path, typer.Argument(help="With *.jinja or tokenizer_config.json files.")],
    output: Annotated[Path | None, typer.Option(help="The JSON record.")] = None,
    of: Annotated[str | None, typer.Option(help="Where the templates are from, for the record.")] = None,
    random: Annotated[int, typer.Option(help="Random conversations for each template.", min=0)] = 20,
) -> None:
    """Chat templates of a folder, rendered for many conversations by the engine and by transformers."""
    found = dict(templates(folder))
    if not found:
        sys.exit(f"{folder}: expected *.jinja files or tokenizer_config.json files with a chat_template, found none")
    counts: Counter[str] = Counter()
    drawn = {f"random {seed}": random_conversation(Random(seed)) for seed in range(random)}
    conversations = CONVERSATIONS | drawn
    of_conversations: dict[str, Counter[str]] = {name: Counter() for name in conversations}
    pairs, broken = [], []
    for name, source in track(found.items(), "templates"):
        try:
            template = ChatTemplate(source, TOKENS)
        except TemplateSyntaxError as error:
            broken.append({"template": name, "error": f"line {error.lineno}: {error.message}"})
            continue
        for title, conversation in conversations.items():
            for generation in generation_prompts(conversation):
                outcome, why = compare(template, source, conversation, generation)
                counts[outcome] += 1
                of_conversations[title][outcome] += 1
                if outcome not in ("equal", "equal in another form", "both refuse"):
                    pair = {"template": name, "conversation": title, "add_generation_prompt": generation}
                    pairs.append({**pair, "outcome": outcome, **({"why": why} if why else {})})
    record = {
        **result.header(),
        "transformers": transformers.__version__,
        "templates": len(found),
        "templates_of": of,
        "templates_sha256": hashlib.sha256("".join(sorted(found.values())).encode()).hexdigest(),
        "conversations": len(conversations),
        "outcomes": OUTCOMES,
        "pairs": counts.total(),
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "counts_of_conversations": of_conversations,
        "not_equal": pairs,
        "not_compiled": broken,
    }
    if output is not None:
        result.write(record, output)
    print(json.dumps({name: record[name] for name in ("templates", "conversations", "pairs", "counts")}, indent=1))
    sys.exit(any(counts[outcome] for outcome in BAD))


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and sources; a template that two files have is taken once."""
    seen = set()
    for path in sorted([*folder.rglob("*.jinja"), *folder.rglob("tokenizer_config.json")]):
        name, sources = str(path.relative_to(folder)), {"": path.read_text()}
        if path.suffix == ".json":
            given = json.loads(sources[""]).get("chat_template") or {}
            sources = {"": given} if isinstance(given, str) else {f":{t['name']}": t["template"] for t in given}
        for part, source in sources.items():
            if source not in seen:
                seen.add(source)
                yield name + part, source


def generation_prompts(conversation: Conversation) -> list[bool]:
    return [False] if "continue_final_message" in conversation.variables else [False, True]


def compare(template: ChatTemplate, source: str, conversation: Conversation, generation: bool) -> tuple[str, str]:
    """An outcome, and why where one side refuses."""
    messages, tools, variables = conversation.messages, conversation.tools, conversation.variables
    expected, complaint = reference(source, conversation, messages, generation, keep_nulls=False)
    try:
        text = template.render(messages, tools, generation, variables)
    except InvalidRequest as error:
        return ("both refuse", "") if expected is None else ("the engine refuses", str(error)[:200])
    if text == expected:
        return "equal", ""
    for form, keep_nulls in product(forms(messages), (False, True)):
        if text == reference(source, conversation, form, generation, keep_nulls)[0]:
            return "equal in another form", ""
    return ("transformers refuses", complaint) if expected is None else ("different", "")


def reference(
    source: str, conversation: Conversation, messages: list[Message], generation: bool, keep_nulls: bool
) -> tuple[str | None, str]:
    """The text that transformers gives, or what it says against the messages."""
    stated = [{key: value for key, value in m.items() if keep_nulls or value is not None} for m in messages]
    try:
        texts, _ = render_jinja_template(
            conversations=[deepcopy(stated)],
            tools=conversation.tools,
            chat_template=source,
            add_generation_prompt=generation,
            **{**TOKENS, **conversation.variables},
        )
    except Exception as error:  # templates raise what they like
        return None, f"{type(error).__name__}: {error}"[:200]
    return texts[0], ""


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The same messages with texts as parts, parts as texts, JSON as objects, and reasoning under its third name."""
    for content, arguments, reasoning in product((None, str, list), (False, True), (False, True)):
        yield [_form(deepcopy(message), content, arguments, reasoning) for message in messages]


def _form(message: Message, content: type | None, arguments: bool, reasoning: bool) -> Message:
    given = message.get("content")
    if content is str and isinstance(given, list):
        message["content"] = "\n".join(part["text"] for part in given)
    if content is list and isinstance(given, str):
        message["content"] = [{"type": "text", "text": given}]
    for call in (message.get("tool_calls") or []) if arguments else []:
        if isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    names: Mapping[str, Any] = {n: message[n] for n in ("reasoning_content", "thinking") if message.get(n)}
    if reasoning and names:
        message["reasoning"] = next(iter(names.values()))
    return message
