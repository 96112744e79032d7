"""Messages of OpenAI's wire format in the forms that templates are written for; what is right stands here by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jinja2 import Environment
from support.text.own_templates import TEMPLATES

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_messages import MessageForms


def forms(template: str) -> MessageForms:
    source = TEMPLATES[template].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return MessageForms(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))


def applied(template: str, **message: Any) -> dict[str, Any]:
    (form,) = forms(template).apply([{"role": "assistant", **message}])
    return form


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "a1", "type": "function", "function": {"name": "f", "arguments": arguments}}


PARTS = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    ("template", "content", "form"),
    [
        ("text, trimmed", PARTS, "One\ntwo"),
        ("text, joined", PARTS, "One\ntwo"),
        ("text, joined", ["One", PARTS[1]], "One\ntwo"),
        ("text, joined", [], ""),
        ("text, joined", " Hi ", " Hi "),
        ("text, joined", [{"rows": 3}], [{"rows": 3}]),  # a tool's own list
        ("parts only", PARTS, PARTS),
        ("parts only", "Hi", [{"type": "text", "text": "Hi"}]),
        *((name, PARTS, PARTS) for name in ("a text or parts", "a macro for content", "the first part")),
        *((name, "Hi", "Hi") for name in ("a text or parts", "a macro for content", "the first part")),
    ],
)
def test_content_is_a_text_or_a_list_as_the_template_takes_it(template: str, content: Any, form: Any) -> None:
    assert applied(template, content=content) == {"role": "assistant", "content": form}


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("template", "content", "form"),
    [
        *((name, PARTS, "One\ntwo") for name in ("a text or parts", "a macro for content", "the first part")),
        ("a text or parts", [*PARTS, IMAGE], [*PARTS, IMAGE]),
        ("a text or parts", [{"rows": 3}], [{"rows": 3}]),
        ("parts only", PARTS, PARTS),
        ("text, joined", PARTS, "One\ntwo"),
    ],
)
def test_a_tools_result_is_a_text_wherever_the_template_takes_one(template: str, content: Any, form: Any) -> None:
    assert applied(template, role="tool", content=content) == {"role": "tool", "content": form}


@pytest.mark.parametrize(
    ("template", "arguments", "form"),
    [
        ("arguments by tojson", '{"a": [1, 2.5, "é"]}', {"a": [1, 2.5, "é"]}),
        ("arguments by items", '{"id": 12345678901234567890}', {"id": 12345678901234567890}),
        ("arguments by a filter", "{}", {}),
        ("arguments by items", "", {}),
        ("arguments by items", None, {}),
        ("arguments are a text", '{"a":1}', '{"a":1}'),
        ("arguments are either", '{"a":1}', '{"a":1}'),
        *((name, {"a": 1}, {"a": 1}) for name in TEMPLATES if name.startswith("arguments")),
    ],
)
def test_arguments_are_an_object_unless_the_template_takes_a_text(template: str, arguments: Any, form: Any) -> None:
    assert applied(template, tool_calls=[call(arguments)])["tool_calls"] == [call(form)]


def test_calls_of_other_shapes_are_the_templates_business() -> None:
    odd = [{"id": "a1"}, {"function": {"name": "f"}}, {"function": "f"}, "f"]
    assert applied("arguments by items", tool_calls=odd)["tool_calls"] == odd
    assert applied("arguments by items", tool_calls="f")["tool_calls"] == "f"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_all_three_names(name: str) -> None:
    form = applied("text, joined", content="a", **{name: "because"})
    assert {form[key] for key in ("reasoning", "reasoning_content", "thinking")} == {"because"}


def test_several_names_of_reasoning_keep_their_own() -> None:
    form = applied("text, joined", content="a", thinking="t", reasoning="r")
    assert (form["reasoning_content"], form["thinking"], form["reasoning"]) == ("t", "t", "r")


def test_nulls_stay_where_the_template_asks_for_them() -> None:
    message = {"content": None, "tool_calls": None, "refusal": None}
    assert applied("asks for null content", **message) == {"role": "assistant", "content": None}
    assert applied("asks for null calls", **message) == {"role": "assistant", "tool_calls": None}
    assert applied("text, joined", **message) == {"role": "assistant"}
    left_out = forms("asks for null content").apply([{"role": "assistant", **message}], keep_nulls=False)
    assert left_out == [{"role": "assistant"}]


def test_the_clients_messages_are_left_as_they_are() -> None:
    messages = [{"role": "assistant", "content": PARTS, "thinking": "t", "tool_calls": [call("{}")], "name": None}]
    before = copy.deepcopy(messages)
    forms("arguments by items").apply(messages)
    assert messages == before


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": [*PARTS, {"type": "image_url"}]}, r"messages\[1\].content\[2\]: expected a part of type text"),
        ({"content": [{"type": "text"}]}, r"messages\[1\].content\[0\]: expected a part of type text"),
        ({"tool_calls": [call({}), call("{")]}, r"messages\[1\].tool_calls\[1\].function.arguments: not valid JSON"),
        ({"tool_calls": [call("[1]")]}, r"tool_calls\[0\].function.arguments: expected a JSON object, got '\[1\]'"),
        ({"tool_calls": [call("[" * 10**5)]}, r"tool_calls\[0\].function.arguments: not valid JSON"),
        ({"role": None}, r'messages\[1\]: expected an object with a "role"'),
    ],
)
def test_what_has_no_form_for_the_template_is_named(message: dict[str, Any], complaint: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **message}]
    with pytest.raises(InvalidRequest, match=complaint):
        forms("arguments by tojson").apply(messages)
