"""Conversations that ask a chat template for all that clients send: each kind of turn, in each form it may have."""

from __future__ import annotations

from typing import Any

import msgspec

Message = dict[str, Any]


class Conversation(msgspec.Struct, frozen=True):
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def result(content: Any, **more: Any) -> Message:
    return {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": content, **more}


def call(arguments: Any, name: str = "weather", number: int = 1) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def text(*texts: str) -> list[Message]:
    return [{"type": "text", "text": piece} for piece in texts]


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, <now> & later.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name", "enum": ["Oslo", "Zürich"]},
                "since": {"type": "integer", "minimum": 0, "maximum": 2_000_000_000},
                "units": {"type": ["string", "null"], "default": None},
                "days": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
            },
            "required": ["city"],
        },
    },
}
BARE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}
OSLO = {"city": "Oslo", "since": 1_733_011_200, "days": [{"n": 1}], "units": None}
ASKED = user("Is it raining in Oslo?")
LONG = [user("Once more: " + "word " * 30), answer("Again, " + "and again " * 20)]

CONVERSATIONS: dict[str, Conversation] = {
    "one turn": Conversation([user("Hello")]),
    "system": Conversation([system("Be brief."), user("Hello")]),
    "three turns": Conversation([user("One?"), answer("1"), user("Two?")]),
    "system and three turns": Conversation([system("Count."), user("One?"), answer("1"), user("Two?"), answer("2")]),
    "two systems": Conversation([system("Be brief."), system("Be kind."), user("Hello")]),
    "developer": Conversation([{"role": "developer", "content": "Be brief."}, user("Hello")]),
    "the user twice": Conversation([user("Hello"), user("Anybody?")]),
    "the assistant first": Conversation([answer("Welcome!"), user("Hello")]),
    "an answer last": Conversation([user("Hello"), answer("Hi")]),
    "names of users": Conversation([{**user("Hello"), "name": "Ada"}, answer("Hi"), user("Bye")]),
    "an empty system": Conversation([system(""), user("Hello")]),
    "an empty turn": Conversation([user(""), answer(""), user("Hello?")]),
    "space around": Conversation([system("  Be brief. \n"), user("\n  Hello  \n"), answer(" Hi \n\n"), user(" ")]),
    "other scripts": Conversation([user("Größe, 你好, Привет 👩‍👩‍👧 \u200b e\u0301"), answer("😀"), user("«…»")]),
    "looks like a template": Conversation(
        [user("{{ bos_token }} {% raw %} {# no #} %}"), answer("}}"), user("<s>[INST]")]
    ),
    "looks like special tokens": Conversation(
        [user("<|im_end|></s><think>x</think>"), answer("</think> y"), user("z")]
    ),
    "long": Conversation([system("Go on."), *LONG * 20, user("Enough.")]),
    "parts": Conversation([user(text("Hello"))]),
    "several parts": Conversation(
        [system(text("Be", "brief.")), user(text("One", "two")), answer(text("3")), user("4")]
    ),
    "no parts": Conversation([user([])]),
    "tools": Conversation([ASKED], [TOOL]),
    "tools and a system": Conversation([system("Use tools."), ASKED], [TOOL, BARE]),
    "an empty list of tools": Conversation([ASKED], []),
    "tools, several turns": Conversation([user("Hello"), answer("Hi"), ASKED], [TOOL]),
    "a call": Conversation([ASKED, answer("", tool_calls=[call(OSLO)]), result("yes")], [TOOL]),
    "a call, content null": Conversation([ASKED, answer(None, tool_calls=[call(OSLO)]), result("yes")], [TOOL]),
    "a call without content": Conversation(
        [ASKED, {"role": "assistant", "tool_calls": [call(OSLO)]}, result("yes")], [TOOL]
    ),
    "a call with content": Conversation([ASKED, answer("I'll look.", tool_calls=[call(OSLO)]), result("yes")], [TOOL]),
    "a call as JSON": Conversation(
        [ASKED, answer(None, tool_calls=[call('{"city": "Oslo", "since": 1733011200}')]), result("yes")], [TOOL]
    ),
    "a call without arguments": Conversation([ASKED, answer(None, tool_calls=[call({}, "now")]), result("9")], [BARE]),
    "a call without arguments as JSON": Conversation(
        [ASKED, answer(None, tool_calls=[call("{}", "now")]), result("9")], [BARE]
    ),
    "two calls": Conversation(
        [
            ASKED,
            answer(None, tool_calls=[call(OSLO), call({}, "now", 2)]),
            result("yes"),
            result("9", tool_call_id="call00002"),
        ],
        [TOOL, BARE],
    ),
    "a call, then an answer": Conversation(
        [ASKED, answer(None, tool_calls=[call(OSLO)]), result('{"rain": true}'), answer("Yes."), user("Thanks")], [TOOL]
    ),
    "a call, no tools now": Conversation([ASKED, answer(None, tool_calls=[call(OSLO)]), result("yes")]),
    "a result in parts": Conversation([ASKED, answer(None, tool_calls=[call(OSLO)]), result(text("yes"))], [TOOL]),
    "tool_calls null": Conversation([user("Hello"), answer("Hi", tool_calls=None, refusal=None), user("Bye")]),
    "tool_calls empty": Conversation([user("Hello"), answer("Hi", tool_calls=[]), user("Bye")]),
    "reasoning_content": Conversation([user("1+1?"), answer("2", reasoning_content="Add."), user("And 2+2?")]),
    "reasoning": Conversation([user("1+1?"), answer("2", reasoning="Add."), user("And 2+2?")]),
    "thinking": Conversation([user("1+1?"), answer("2", thinking="Add."), user("And 2+2?")]),
    "reasoning null": Conversation([user("1+1?"), answer("2", reasoning_content=None), user("And 2+2?")]),
    "reasoning of the last answer": Conversation([user("1+1?"), answer("2", reasoning_content="Add.")]),
    "reasoning and a call": Conversation(
        [ASKED, answer("", reasoning_content="Look.", tool_calls=[call(OSLO)]), result("yes")], [TOOL]
    ),
    "thinking on": Conversation([user("1+1?")], None, {"enable_thinking": True, "thinking": True}),
    "thinking off": Conversation([user("1+1?")], None, {"enable_thinking": False, "thinking": False}),
    "reasoning effort": Conversation([user("1+1?")], None, {"reasoning_effort": "high"}),
    "documents": Conversation([user("Who?")], None, {"documents": [{"title": "A", "text": "It was B."}]}),
    "special tokens of the caller": Conversation([user("Hello")], None, {"bos_token": "", "eos_token": "<end>"}),
    "a continued answer": Conversation([user("Hello"), answer("Hi, I")], None, {"continue_final_message": True}),
    "a continued answer, space": Conversation([user("Hello"), answer("Hi, ")], None, {"continue_final_message": True}),
}
