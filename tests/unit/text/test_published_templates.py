"""The chat templates of the families that the engine runs, as published, against transformers."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from support.places import ROOT

from benchmarks.accuracy.chat_templates import TOKENS, generation_prompts, reference
from benchmarks.accuracy.conversations import Conversation
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
