"""What templates may not do to the process they run in, and that all the rest is left to them."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text import template_sandbox
from nanoflow_backend.text.chat_template import ChatTemplate

STAMP = 1_733_011_200
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hello", "n": STAMP}]
BUSY_CHARACTERS = 60_000


def render(source: str, content: str = "Hello") -> str:
    return ChatTemplate(source, {}).render([{**CHAT[0], "content": content}])


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum(n=1000) }}",
    ],
)
def test_templates_do_not_reach_the_interpreter(escape: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses them"):
        render(escape)


@pytest.mark.parametrize(
    "growth",
    [
        "{{ range(10**9) | list }}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set x = namespace(n=2) %}{% for _ in range(99) %}{% set x.n = x.n * x.n %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, '1000000000') }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a' | indent(width=10**9, first=true) }}",
        "{{ 1 | round(10**9) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a\\t'.expandtabs(10**9) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{% for _ in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)
def test_the_short_ways_to_huge_texts_and_loops_are_refused(growth: str) -> None:
    begun_s = time.thread_time()
    with pytest.raises(InvalidRequest, match=r"does not allow|Range too big"):
        render(growth)
    assert time.thread_time() - begun_s < 1


@pytest.mark.parametrize(
    "source",
    [
        "{% macro show(v) %}{{ v | tojson }}{% endmacro %}{{ show(messages[0].n) }}",
        "{{ messages[0].get('missing', messages[0].n) }}",
        "{{ messages[0].missing | default(messages[0].n) }}",
        "{% set ns = namespace(last=messages[0].n) %}{{ ns.last }}",
        "{{ messages | selectattr('n', 'equalto', messages[0].n) | list | length }}",
        "{{ '{} {:>12}'.format(messages[0].n, 7) }}",
        "{{ '%d %09d' | format(messages[0].n, 7) }}",
        "{{ messages[0].content | truncate(10000000) }}{{ 'a' | center(9) }}{{ [messages[0].n] | tojson(indent=4) }}",
        "{{ [1000000, 2000000] | sum(start=3000000) }}{{ dict(a=1733011200).a + 10**15 }}",
    ],
)
def test_integers_that_are_data_are_not_bounded(source: str) -> None:
    assert render(source) == render_jinja_template(conversations=[CHAT], chat_template=source)[0][0]


@pytest.mark.parametrize(
    "busy",
    [
        "{{ text | selectattr('kind', 'equalto', 'x') | list | length }}",
        "{{ text | map('upper') | list | length }}",
        "{{ text | unique | sort | groupby('x') | list }}{{ text | map('int') | sum }}",
        "{{ text | list is sequence }}{% if text | map('upper') | list is iterable %}{% endif %}",
        "{% for c in text %}{% for d in text %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) if n < 50 }}{{ f(n + 1) if n < 50 }}{% endmacro %}{{ f(0) }}",
        "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    ],
)
def test_cpu_time_is_bounded_in_loops_calls_filters_and_tests(busy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "BASE_S", 0.01)
    monkeypatch.setattr(template_sandbox, "S_PER_CHARACTER", 0.2e-6)
    begun_s = time.thread_time()
    with pytest.raises(InvalidRequest, match=r"more than 0\.022 s, which the sandbox does not allow"):
        render("{% set text = messages[0].content ~ '' %}" + busy, "a" * BUSY_CHARACTERS)
    assert time.thread_time() - begun_s < 0.2
    assert sys.getprofile() is None


def test_the_bound_grows_with_the_input_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long chat in a template that looks at each character of it takes as long as it is; a short one may not."""
    source = "{% for m in messages %}{{ m.content }}{% for c in m.content %}{{ c.x }}{{ c.x }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(template_sandbox, "BASE_S", 0.0)
    monkeypatch.setattr(template_sandbox, "S_PER_CHARACTER", 60e-6)  # where others want the cores, it takes more
    assert render(source, "a" * BUSY_CHARACTERS) == "a" * BUSY_CHARACTERS
    monkeypatch.setattr(template_sandbox, "MOST_S", 0.02)
    with pytest.raises(InvalidRequest, match=r"more than 0\.02 s"):
        render(source, "a" * BUSY_CHARACTERS)


def test_waiting_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "BASE_S", 0.05)
    monkeypatch.setattr(template_sandbox, "_check_format", lambda _: time.sleep(0.2))
    assert render("{{ '%s' | format('a') }}") == "a"


def test_the_end_of_a_rendering_is_no_way_around_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call is the one that is found to be too late, the bound's own included, the request is refused."""
    monkeypatch.setattr(template_sandbox, "MOST_S", -1.0)
    template, late = ChatTemplate("{{ messages[0].content }}", {}), 0
    for calls in range(1, 400):
        monkeypatch.setattr(template_sandbox, "CALLS_PER_CHECK", calls)
        try:
            assert template.render(CHAT) == "Hello"
        except InvalidRequest:
            late = calls
        assert sys.getprofile() is None
    assert 20 < late < 399


def test_a_profiler_of_the_thread_is_left_in_place() -> None:
    calls: list[str] = []
    sys.setprofile(lambda *_: calls.append("call"))
    try:
        outer = sys.getprofile()
        render("{{ messages[0].content }}")
        assert sys.getprofile() is outer
    finally:
        sys.setprofile(None)
