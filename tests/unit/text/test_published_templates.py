"""The chat templates of the families that the engine runs, as published, against transformers."""

from __future__ import annotations

from datetime import datetime
from random import Random
from typing import Any

import pytest
from support.places import ROOT

from benchmarks.accuracy.chat_templates import TOKENS, generation_prompts, reference
from benchmarks.accuracy.conversations import Conversation, answer, call, result, user
from benchmarks.accuracy.random_conversations import ROLES, as_a_client_sends_it, random_conversation
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_template import ChatTemplate

FOLDER = ROOT / "tests" / "support" / "text" / "published"
PUBLISHED = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
WALKS_OVER_PARTS = ("mistral_small_3_2",)  # but for those of tools; so it writes several without an end of line


def rendered(template: ChatTemplate, conversation: Conversation, generation: bool) -> str | None:
    try:
        return template.render(conversation.messages, conversation.tools, generation, conversation.variables)
    except InvalidRequest:
        return None


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_conversations_are_rendered_as_by_transformers_in_either_form(name: str) -> None:
    """The reference gets the form that templates are written for, the engine also what an OpenAI client sends."""
    source, random, shown = PUBLISHED[name], Random(name), 0
    template = ChatTemplate(source, TOKENS)
    for _ in range(40):
        conversation = random_conversation(random)
        split = ("tool", "ipython") if name in WALKS_OVER_PARTS else ROLES
        sent = as_a_client_sends_it(conversation, random, split)
        for generation in generation_prompts(conversation):
            expected, complaint = reference(source, conversation, conversation.messages, generation, keep_nulls=False)
            if "does not appear in the chat" in complaint:
                continue  # a continued answer whose reasoning the template moves: the engine finds its end all the same
            assert rendered(template, conversation, generation) == expected, conversation
            assert rendered(template, sent, generation) == expected, sent
            shown += expected is not None
    assert shown >= 20


def said(name: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(PUBLISHED[name], TOKENS).render(messages, variables=variables)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_first"])
def test_qwen3_thinks_unless_it_is_told_not_to(name: str) -> None:
    assert said(name, user("1+1?")).endswith("<|im_start|>assistant\n")
    assert said(name, user("1+1?"), enable_thinking=True).endswith("<|im_start|>assistant\n")
    assert said(name, user("1+1?"), enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_first"])
def test_reasoning_stays_before_what_it_led_to_until_the_user_speaks_again(name: str, field: str) -> None:
    steps = [
        user("Rain?"),
        answer("I'll look.", tool_calls=[call({"city": "Oslo"})], **{field: "Ask."}),
        result("pouring"),
        answer("It rains.", **{field: "So yes."}),
    ]
    shown = ["<think>\nAsk.\n</think>", "I'll look.", '{"city": "Oslo"}', "pouring", "So yes.\n</think>", "It rains."]
    text = said(name, *steps)
    assert [text.count(piece) for piece in shown] == [1] * len(shown)
    assert sorted(shown, key=text.index) == shown
    later = said(name, *steps, user("And now?"))
    assert "Ask." not in later
    assert "So yes." not in later
    assert "It rains." in later


def test_templates_know_the_date() -> None:
    before = datetime.now()
    texts = [said("mistral_small_3_2", user("Hello")), said("llama3_2", user("Hello"))]
    formats = ["The current date is %Y-%m-%d", "Today Date: %d %b %Y"]
    for text, form in zip(texts, formats, strict=True):
        assert any(moment.strftime(form) in text for moment in (before, datetime.now()))
    assert "Today Date: 26 Jul 2024" in said("llama3_2", user("Hello"), date_string="26 Jul 2024")
