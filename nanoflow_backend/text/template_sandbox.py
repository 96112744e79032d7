"""Sandbox: jinja2's own, with bounds on what a template may take in time and size.

A template is a program that comes with the checkpoint and runs on what clients send. jinja2's sandbox keeps it away
from the interpreter; this one also ends a rendering that takes too long, and refuses the short ways to huge texts. It
is no fence around memory: a template that joins a text with itself makes its square.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_S = 1.0  # of one rendering; long conversations take milliseconds
MOST_CHARACTERS = 16 * 2**20  # of a text that is rendered, or made by `*`
MOST_NUMBER = 100_000  # as an argument: jinja2's own bound on a range
MOST_BITS = 4096  # of a computed integer
WIDTHS = re.compile(r"[%{][^%{}A-Za-z]*(\d{6}|\*)|\{[^{}]*\{")  # "%1000000d", "%*d", "{:1000000}", "{:{}}"

_deadline_s: ContextVar[float] = ContextVar("deadline_s")  # of time.monotonic(); unset outside of `render`


class Sandbox(ImmutableSandboxedEnvironment):
    """Render its templates with `render`, which raises SecurityError (a TemplateError) where they go too far."""

    intercepted_binops = frozenset({"*", "**", "%"})  # not folded into constants either, when a template is compiled

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]
        self.filters |= {name: _bounded(function) for name, function in self.filters.items()}
        self.filters["metered"] = _metered

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        pieces, characters = [], 0
        token = _deadline_s.set(time.monotonic() + MOST_S)
        try:
            for piece in template.generate(variables):
                characters += len(piece)
                _require(characters <= MOST_CHARACTERS, f"more than {MOST_CHARACTERS} characters")
                _check_time()
                pieces.append(piece)
        finally:
            _deadline_s.reset(token)
        return "".join(pieces)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template, of macros too."""
        _check_time()
        _check_arguments(*args, *kwargs.values())
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format and str.format_map
        if isinstance(text := getattr(method, "__self__", None), str) and method.__name__.startswith("format"):
            _check_format(text)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _require(bits <= MOST_BITS, f"an integer of {bits} bits")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(times, int):
                    _require(len(text) * times <= MOST_CHARACTERS, f"a repetition to {len(text) * times} items")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "metered", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return tree


def _metered(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments, but for the value that it filters, are bounded."""
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args[first:], *kwargs.values())
        if function.__name__ == "do_format":
            _check_format(str(args[first - 1]))
        return function(*args, **kwargs)

    return bounded


def _check_arguments(*arguments: Any) -> None:
    for argument in arguments:
        if isinstance(argument, int):
            _require(abs(argument) <= MOST_NUMBER, f"the argument {argument}")


def _check_format(text: str) -> None:
    _require(WIDTHS.search(text) is None, "a format with a width of six digits, or one that is computed")


def _check_time() -> None:
    deadline_s = _deadline_s.get(None)
    _require(deadline_s is None or time.monotonic() <= deadline_s, f"more than {MOST_S:g} s")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise SecurityError(f"{what}, which the sandbox does not allow")
