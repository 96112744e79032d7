"""ChatTemplate: messages to prompt text, by a checkpoint's jinja2 template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.template_sandbox import Sandbox

Message = Mapping[str, Any]


class ChatTemplate:
    """One template with the special tokens it may name (`bos_token`, `eos_token`, ...).

    Templates find what transformers gives them: `messages`, `tools`, `documents`, `add_generation_prompt`,
    `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, `break`, `continue`, `generation` blocks.

    Raises:
        jinja2.TemplateSyntaxError: at construction.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._sandbox = _sandbox()
        self._template = self._sandbox.from_string(source, globals=dict(special_tokens))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; `variables` are further ones of the template (`enable_thinking`, ...).

        Raises:
            InvalidRequest: naming the message that is not one, or with what the template says against them.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InvalidRequest(f"messages: expected a list of at least one message, got {messages!r}")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequest(f'messages[{index}]: expected an object with a "role", got {message!r}')
        # clients send `"tool_calls": null`; templates ask whether the key is there
        stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise InvalidRequest(f"tools[{index}]: expected an object, got {tool!r}")
        given = {"messages": stated, "tools": tools, "add_generation_prompt": add_generation_prompt}
        extra = dict(variables or {})
        if taken := sorted(extra.keys() & {*given, *self._template.globals}):
            raise InvalidRequest(f"chat_template_kwargs: expected no {', '.join(taken)}: templates are given that")
        try:
            return self._sandbox.render(self._template, {"documents": None, **extra, **given})
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # a template is a program run on the client's data: whatever it raises is about that data
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here its body is only rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _sandbox() -> Sandbox:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
