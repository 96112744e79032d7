"""What a template's source tells of its ways with a key."""

from __future__ import annotations

import pytest
from jinja2 import Environment

from nanoflow_backend.text.template_uses import NONE, TemplateUses, read_uses

LOOP = "{% for m in messages %}$ {% endfor %}"


def uses(source: str, key: str = "content") -> set[str]:
    found = read_uses(Environment().parse(source))[key]
    return {name for name in TemplateUses.__struct_fields__ if getattr(found, name)}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("{{ m.content }}", {"as_text"}),
        ("{{ m['content'] | trim }}", {"as_text"}),
        ("{{ '<' + m.content }}", {"as_text"}),
        ("{{ '<' ~ m.get('content') }}", {"as_text"}),
        ("{% if m.content.startswith('x') %}{% endif %}", {"as_text"}),
        ("{{ m.content or '' }}", {"as_text"}),
        ("{{ m.content if m.content is string else '' }}", {"as_text", "asks_kind", "asks_text"}),
        ("{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}", {"as_text"}),
        ("{% for part in m.content %}{{ part.text }}{% endfor %}", {"as_items"}),
        ("{% for part in m.content | selectattr('type', 'eq', 'text') %}{{ part.text }}{% endfor %}", {"as_items"}),
        ("{{ m.content[0].text }}", {"as_items"}),
        ("{{ m.content[-1]['text'] }}", {"as_items"}),
        ("{{ m.content | map(attribute='text') | join }}", {"as_items"}),
        ("{{ m.content | tojson }}", {"as_object"}),
        ("{% for k, v in m.content.items() %}{{ k }}{% endfor %}", {"as_object"}),
        ("{% for k, v in m.content | dictsort %}{{ k }}{% endfor %}", {"as_object"}),
        ("{{ m.content['city'] }}", {"as_object"}),
        ("{% if m.content is mapping %}{% endif %}", {"asks_kind"}),
        ("{% if m.content is not none %}{% endif %}", {"asks_null"}),
        ("{% if m.content == none %}{% endif %}", {"asks_null"}),
        ("{% if m.content and m.content | length > 0 %}{% endif %}", set()),
        ("{{ m.role }}{{ content }}", set()),
        ("{% set c = m.content %}{{ c }}", {"as_text"}),
        ("{% set c = m.content %}{% set d = c | default([]) %}{% for part in d %}{% endfor %}", {"as_items"}),
        ("{% set c = m.content | trim %}{% for x in c %}{% endfor %}", {"as_text"}),
        ("{% set ns = namespace() %}{% set ns.c = m.content %}{{ ns.c }}", {"as_text"}),
        ("{% set c = c or m.content %}{{ c + 'x' }}", {"as_text"}),
        ("{% macro show(c, x) %}{% for part in c %}{% endfor %}{% endmacro %}{{ show(m.content, 1) }}", {"as_items"}),
        ("{% macro show(x, c) %}{{ c }}{% endmacro %}{{ show(1, c=m.content) }}", {"as_text"}),
    ],
)
def test_what_is_done_with_a_key(expression: str, found: set[str]) -> None:
    assert uses(LOOP.replace("$", expression)) == found


def test_keys_are_told_apart() -> None:
    tree = Environment().parse(LOOP.replace("$", "{{ m.a }}{% if m.b is none %}{% endif %}{{ m.c }}"))
    found = read_uses(tree)
    assert [found[key].as_text for key in "abcd"] == [True, False, True, False]
    assert [found[key].asks_null for key in "abcd"] == [False, True, False, False]
    assert found["d"] == NONE
