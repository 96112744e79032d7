"""ChatTemplate turns chat messages into the text of a prompt, by a checkpoint's jinja2 template, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_messages import REASONING, Message, MessageForms
from nanoflow_backend.text.template_sandbox import Sandbox

# What transformers' `apply_chat_template` takes beside variables, and why it is refused among them.
ORDERS = {
    **dict.fromkeys(("messages", "conversation"), "there is an input messages"),
    **dict.fromkeys(("tools", "add_generation_prompt"), "there is an input of that name"),
    "chat_template": "the model's own is used",
    **dict.fromkeys(("truncation", "max_length"), "a conversation is never cut"),
    "sanitize_control_tokens": "special tokens in messages are tokens",
    **dict.fromkeys(
        ("tokenize", "padding", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        "the prompt's form is the engine's",
    ),
}


class ChatTemplate:
    """One template with the special tokens it may name (`bos_token`, `eos_token`, ...).

    Templates find what transformers gives them: `messages`, `tools`, `documents`, `add_generation_prompt`, the
    sandbox's functions, `break`, `continue`, `generation` blocks.

    Raises:
        jinja2.TemplateSyntaxError: at construction.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._template = self._sandbox.from_string(source)
        self._forms = MessageForms(self._sandbox.parse(source))
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            add_generation_prompt: whether the template begins the answer; by default it does, unless the final
                message is continued.
            variables: further ones of the template (`enable_thinking`, ...), which go before special tokens of their
                name. `documents`, a list of objects, and `continue_final_message` are orders, as in transformers: the
                text ends where the final message's content does, or the field of it that is named.

        Raises:
            InvalidRequest: naming what is wrong with the input, or with what the template says against it.
        """
        extra = dict(variables or {})
        if taken := sorted(extra.keys() & ORDERS):
            raise InvalidRequest(f"chat_template_kwargs: expected no {taken[0]}: {ORDERS[taken[0]]}")
        documents = extra.pop("documents", None)
        for name, objects in (("tools", tools), ("chat_template_kwargs: documents", documents)):
            _check_objects(name, objects)
        continued = extra.pop("continue_final_message", None) or None
        if continued is not None and add_generation_prompt:
            raise InvalidRequest("continue_final_message: expected add_generation_prompt to be false with it")
        given = {
            **self._special_tokens,
            **extra,
            "documents": documents,
            "tools": tools,
            "add_generation_prompt": continued is None if add_generation_prompt is None else add_generation_prompt,
        }
        characters = _characters([messages, tools, documents, extra])
        stated = self._forms.apply(messages)
        try:
            return self._text(stated, given, continued, characters)
        except InvalidRequest:
            if not any(value is None for message in stated for value in message.values()):
                raise
            return self._text(self._forms.apply(messages, keep_nulls=False), given, continued, characters)

    def _text(self, messages: list[dict[str, Any]], given: Mapping[str, Any], continued: Any, characters: int) -> str:
        final = None if continued is None else _Final.of(continued, messages)
        try:
            text = self._sandbox.render(self._template, {**given, "messages": messages}, characters)
        except Exception as error:
            # a template is a program run on the client's data: whatever it raises is about that data
            what = str(error) or type(error).__name__
            raise InvalidRequest(f"messages: the model's chat template refuses them: {what}") from error
        return text if final is None else final.cut(text)


class _Final:
    """The end of the message that is to be continued, marked so that it is found in the text."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    @classmethod
    def of(cls, field: Any, messages: list[dict[str, Any]]) -> _Final:
        """Mark the field's end in the final message, in place."""
        if field is not True and not isinstance(field, str):
            raise InvalidRequest(f"continue_final_message: expected a boolean or a field's name, got {field!r}")
        name = "content" if field is True else field
        message = messages[-1]
        value = message.get(name)
        mark = "\ue000"  # for private use: no letter, so that templates leave it as it is
        while mark in str(messages):
            mark += "\ue001"
        if isinstance(value, str):
            same = REASONING if name in REASONING else (name,)
            message |= {alias: value + mark + " " for alias in same if message.get(alias) == value}
            return cls(mark)
        parts = value if isinstance(value, list) else []
        for index in reversed(range(len(parts))):
            if isinstance(parts[index], Mapping) and isinstance(parts[index].get("text"), str):
                marked = {**parts[index], "text": parts[index]["text"] + mark + " "}
                message[name] = [*parts[:index], marked, *parts[index + 1 :]]
                return cls(mark)
        raise InvalidRequest(f"continue_final_message: expected a text in the final message's {name}, got {value!r}")

    def cut(self, text: str) -> str:
        """The text up to the mark. A template that has trimmed the space behind it would have trimmed before it."""
        before, found, after = text.rpartition(self._mark)
        if not found:
            raise InvalidRequest("continue_final_message: the model's chat template does not show what it names")
        return before if after.startswith(" ") else before.rstrip()


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here its body is only rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _check_objects(name: str, objects: Any) -> None:
    if objects is not None and not isinstance(objects, list | tuple):
        raise InvalidRequest(f"{name}: expected a list of objects, got {objects!r}")
    for index, item in enumerate(objects or ()):
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{name}[{index}]: expected an object, got {item!r}")


def _characters(value: Any) -> int:
    """How much a template is given: the characters of all texts, and one for each other value."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        total += len(item) if isinstance(item, str) else 1
    return total
