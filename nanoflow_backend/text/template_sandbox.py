"""The Sandbox is jinja2's own, with bounds on what a template may take in time and size.

A template is a program that comes with the checkpoint and runs on what clients send. jinja2's sandbox keeps it away
from the interpreter; this one also ends a rendering that takes too long for its input, and refuses the short ways to
huge texts and loops. It is no fence around memory: a template that joins a text with itself makes its square.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_S = 10.0  # CPU time of one rendering, whatever its input
BASE_S = 1.0  # CPU time of a short one; most take a millisecond
S_PER_CHARACTER = 20e-6  # more for each character of input: jinja2 takes 3 to 10 us to look at one as at an item
CALLS_PER_CHECK = 1024  # some 0.3 ms
MOST_CHARACTERS = 16 * 2**20  # of a text that is rendered, or made by `*`
MOST_WIDTH = 100_000  # to which a text or a list is filled up: jinja2's own bound on a range
MOST_BITS = 4096  # of a computed integer
WIDTHS = re.compile(r"[%{][^%{}A-Za-z]*(\d{6}|\*)|\{[^{}]*\{")  # "%1000000d", "%*d", "{:1000000}", "{:{}}"

# What fills up to a width or a count that is an argument. Elsewhere integers are data, however large.
FILLING_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson"})
FILLING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"})


class Sandbox(ImmutableSandboxedEnvironment):
    """Render its templates with `render`, which raises SecurityError (a TemplateError) where they go too far.

    Templates find the functions that transformers gives them: `raise_exception`, `strftime_now`, and a `tojson` without
    HTML escapes.
    """

    intercepted_binops = frozenset({"*", "**", "%"})  # not folded into constants either, when a template is compiled

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters |= {"tojson": _tojson, "metered": _metered, "format": _format(self.filters["format"])}
        self.filters |= {name: _filling(self.filters[name]) for name in FILLING_FILTERS}

    def render(self, template: Template, variables: Mapping[str, Any], input_characters: int) -> str:
        """A template's text, on the CPU time that an input of so many characters may take.

        Raises: SecurityError, it takes longer; and whatever a template raises.
        """
        most_s = min(BASE_S + S_PER_CHARACTER * input_characters, MOST_S)
        outer = sys.getprofile()
        try:
            try:
                sys.setprofile(_counter(most_s))
                return _join(template.generate(variables))
            finally:
                sys.setprofile(outer)  # is a call that is counted, too
        except _OverTime:
            sys.setprofile(outer)
            raise SecurityError(f"more than {most_s:.3g} s, which the sandbox does not allow") from None

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template, of macros too."""
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format and str.format_map
        if isinstance(owner := getattr(method, "__self__", None), str | bytes | int):
            if method.__name__ in FILLING_METHODS:
                _check_widths(*args, *kwargs.values())
            elif isinstance(owner, str) and method.__name__.startswith("format"):
                _check_format(owner)
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


class _OverTime(BaseException):
    """No Exception: jinja2 and its tests catch those."""


def _counter(most_s: float) -> Callable[[object, str, object], None]:
    """A profile function that ends what its thread runs once that has taken so much CPU time.

    Python tells a profile function of every call and of every item that a generator gives. Templates, filters and tests
    are made of those, and the few loops of a template that are not are made to be (`_metered`). What runs in C between
    two calls is bounded by the sizes of texts. At each check other threads of the process get their turn.
    """
    end_s = time.thread_time() + most_s
    left = CALLS_PER_CHECK

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            left = CALLS_PER_CHECK
            if time.thread_time() > end_s:
                raise _OverTime
            time.sleep(0)

    return count


def _join(pieces: Iterable[str]) -> str:
    kept, characters = [], 0
    for piece in pieces:
        characters += len(piece)
        _require(characters <= MOST_CHARACTERS, f"more than {MOST_CHARACTERS} characters")
        kept.append(piece)
    return "".join(kept)


def _metered(items: Iterable[Any]) -> Iterator[Any]:
    yield from items


def _filling(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments, but for the value that it filters, are bounded."""
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_widths(*args[first:], *kwargs.values())
        return function(*args, **kwargs)

    return bounded


def _format(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_format(str(value))
        return function(value, *args, **kwargs)

    return bounded


def _check_widths(*arguments: Any) -> None:
    for argument in arguments:
        if isinstance(argument, int):
            _require(abs(argument) <= MOST_WIDTH, f"the width {argument}")


def _check_format(text: str) -> None:
    _require(WIDTHS.search(text) is None, "a format with a width of six digits, or one that is computed")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise SecurityError(f"{what}, which the sandbox does not allow")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    _check_format(pattern)
    return datetime.now().strftime(pattern)
