"""MessageForms brings a client's chat messages into the forms that a chat template is written for.

Clients speak OpenAI's wire format, templates what transformers' users write. Where both allow several forms of one
thing, the template's own questions decide (`TemplateUses`), so that it is the template that is obeyed:

    content             a list of text parts is joined by newlines, unless the template walks over the parts; that of
                        a tool's result always, since many templates that walk over a user's parts write it as a text;
                        a text becomes a list of one part for a template that knows nothing but parts
    arguments           of tool calls: JSON becomes an object, unless the template takes a text
    reasoning           under each of its three names
    null                stays where the template asks for it, unless it fails then; elsewhere the key is left out, as
                        transformers does
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.template_uses import read_uses

Message = Mapping[str, Any]

# One thing under the names of transformers, of gpt-oss and of vLLM; of several that are given, the first counts.
REASONING = ("reasoning_content", "thinking", "reasoning")
RESULT_ROLES = frozenset({"tool", "ipython", "function", "tool_results"})


class MessageForms:
    """What one template expects of messages. Immutable."""

    def __init__(self, tree: nodes.Template) -> None:
        uses = read_uses(tree)
        content, arguments = uses["content"], uses["arguments"]
        self._joins_parts = not content.as_items
        self._knows_parts_only = content.as_items and not (content.as_text or content.as_object or content.asks_kind)
        takes_text_only = arguments.as_text and not (arguments.as_object or arguments.as_items)
        self._parses_arguments = not (arguments.asks_text or takes_text_only)
        self._nullable = frozenset(key for key, use in uses.items() if use.asks_null)

    def apply(self, messages: Any, keep_nulls: bool = True) -> list[dict[str, Any]]:
        """New messages; the client's own are left as they are.

        Args:
            keep_nulls: whether nulls stay where the template asks for them.

        Raises:
            InvalidRequest: naming the message, and what of it cannot be given to the template.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InvalidRequest(f"messages: expected a list of at least one message, got {messages!r}")
        nullable = self._nullable if keep_nulls else frozenset()
        return [self._message(f"messages[{index}]", message, nullable) for index, message in enumerate(messages)]

    def _message(self, place: str, message: Any, nullable: frozenset[str]) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f'{place}: expected an object with a "role", got {message!r}')
        form = {key: value for key, value in message.items() if value is not None or key in nullable}
        if (reasoning := next((form[name] for name in REASONING if form.get(name) is not None), None)) is not None:
            form |= {name: reasoning for name in REASONING if form.get(name) is None}
        if "content" in form:
            form["content"] = self._content(f"{place}.content", form["content"], form["role"] in RESULT_ROLES)
        if self._parses_arguments and isinstance(calls := form.get("tool_calls"), list):
            form["tool_calls"] = [_parsed(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
        return form

    def _content(self, place: str, content: Any, of_result: bool) -> Any:
        if isinstance(content, str) and self._knows_parts_only:
            return [{"type": "text", "text": content}]
        joins = self._joins_parts or (of_result and not self._knows_parts_only)
        if not isinstance(content, list) or not joins:
            return content
        if not all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in content):
            return content  # none of OpenAI's: what it means is between the client and the template
        for index, part in enumerate(content):
            if isinstance(part, str) or (part["type"] == "text" and isinstance(part.get("text"), str)):
                continue
            if not self._joins_parts:
                return content  # a tool's image, say
            raise InvalidRequest(
                f"{place}[{index}]: expected a part of type text, for the model's chat template takes a text, got "
                f"{part!r}"
            )
        return "\n".join(part if isinstance(part, str) else part["text"] for part in content)


def _parsed(place: str, call: Any) -> Any:
    """A tool call whose arguments are an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments", {}), str | None):
        return call
    text = function["arguments"]
    try:
        arguments = json.loads(text) if text else {}  # clients send "" for a function without parameters
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{place}.function.arguments: not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{place}.function.arguments: expected a JSON object, got {text!r}")
    return {**call, "function": {**function, "arguments": arguments}}
