"""Random conversations, in the form that chat templates are written for and as an OpenAI client sends them."""

from __future__ import annotations

import json
from collections.abc import Collection
from copy import deepcopy
from random import Random
from typing import Any

from benchmarks.accuracy.conversations import BARE, TOOL, Conversation, Message, text

# What a template may take for its own, trim, escape or split at.
TEXTS = (
    "Hello", "", " ", "two\nlines", "  spaces around \n\n", "\n\nlines around\n", "Größe 你好 👩‍👩‍👧 e\u0301",
    "<think>\nHm.\n</think>\n\nYes", "an </think> alone", "<tool_response>\nno tool's\n</tool_response>",
    '<tool_call>\n{"name": "f"}\n</tool_call>', "[INST] x [/INST]", "<|im_end|>", "<|eot_id|><|end|>", "</s><s>",
    '{"a": [1, "<&>"]}', "{{ bos_token }} {% raw %} {# no #}", "1 < 2 & 'three'", "a" * 300,
)  # fmt: skip
ARGUMENTS = ("Oslo", "Zürich <b>", "", 7, -1, 2.5, 1e21, True, None, [1, "two", {"n": None}], {"deep": {"er": []}})
VARIABLES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("low", "high"),
    "date_string": ("01 Dec 2026",),
    "tools_in_user_message": (True, False),
    "builtin_tools": (["code_interpreter", "brave_search"],),
    "custom_tools": ([BARE],),
    "documents": ([{"title": "A", "text": "It was B."}],),
    "bos_token": ("",),
}
REASONING = ("reasoning_content", "thinking", "reasoning")
NULLS = ("content", "tool_calls", "refusal", "audio", *REASONING)
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")


def random_conversation(random: Random) -> Conversation:
    """One whose contents are texts and whose arguments are objects, without nulls."""
    messages: list[Message] = []
    if random.random() < 0.5:
        messages.append(_message(random, random.choice(("system",) * 4 + ("developer",))))
    for _ in range(random.randint(1, 4)):
        messages.append(_message(random, "user"))
        while random.random() < 0.6:
            messages.append(answer := _message(random, "assistant"))
            if random.random() < 0.4:
                answer[random.choice(REASONING)] = random.choice(TEXTS)
            if random.random() < 0.55:
                break
            messages += _called(random, answer, len(messages))
    variables = {name: random.choice(values) for name, values in VARIABLES.items() if random.random() < 0.2}
    last = messages[-1]
    if last["role"] == "assistant" and "content" in last and random.random() < 0.3:
        fields = [True, "content", *(name for name in REASONING if name in last)]
        variables["continue_final_message"] = random.choice(fields)
    return Conversation(messages, random.choice((None, None, [], [TOOL], [BARE], [TOOL, BARE])), variables)


def as_a_client_sends_it(conversation: Conversation, random: Random, split: Collection[str] = ROLES) -> Conversation:
    """The same conversation with nulls, arguments as JSON, and the contents of some roles in parts.

    Args:
        split: roles whose contents may be cut into several parts, at the ends of lines.
    """
    messages = deepcopy(conversation.messages)
    # Of a whole role: templates compare messages, and equal ones stay so.
    parted = {role for role in ROLES if random.random() < 0.5}
    nulls = {role: [name for name in NULLS if random.random() < 0.3] for role in ROLES}
    for message in messages:
        role, content = message["role"], message.get("content")
        if content is not None and role in parted:
            message["content"] = text(*content.split("\n")) if role in split else text(content)
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        message |= {name: None for name in nulls[role] if name not in message}
    return Conversation(messages, conversation.tools, conversation.variables)


def _called(random: Random, answer: Message, first: int) -> list[Message]:
    """The results of calls that the answer is given."""
    numbers = range(first, first + random.choice((1, 1, 1, 2, 3)))
    answer["tool_calls"] = [random_call(random, number) for number in numbers]
    if random.random() < 0.3:
        del answer["content"]
    role = random.choice(("tool",) * 5 + ("ipython",))
    named = {"name": "weather"} if random.random() < 0.5 else {}
    return [_message(random, role, tool_call_id=_id(number), **named) for number in numbers]


def _message(random: Random, role: str, **more: Any) -> Message:
    return {"role": role, "content": random.choice(TEXTS), **more}


def random_call(random: Random, number: int) -> dict[str, Any]:
    arguments = {name: random.choice(ARGUMENTS) for name in ("city", "ß", "x y") if random.random() < 0.5}
    function = {"name": random.choice(("weather", "now", "brave_search")), "arguments": arguments}
    return {"id": _id(number), "type": "function", "function": function}


def _id(number: int) -> str:
    return f"call{number:05}"  # nine letters and figures, as Mistral's templates demand
