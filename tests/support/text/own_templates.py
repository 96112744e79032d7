"""Chat templates written for the tests: one for each way to take content, calls, nulls and reasoning."""

_HEAD = "{% for m in messages %}<{{ m.role }}>"
_FOOT = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}: $]{% endfor %}"


def _calls(arguments: str) -> str:
    return _HEAD + "{{ m.content or '' }}" + _CALLS.replace("$", arguments) + _FOOT


TEMPLATES = {
    # content
    "text, trimmed": _HEAD + "{{ m['content'] | trim }}" + _FOOT,
    "text, joined": "{{ bos_token }}" + _HEAD + "{{ '(' + m.content + ')' + eos_token }}" + _FOOT,
    "parts only": _HEAD + "{% for p in m.content %}{{ p.text }};{% endfor %}" + _FOOT,
    "a text or parts": _HEAD + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}" + _FOOT,
    "a macro for content": "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ part.text }}|{% endfor %}{% endif %}{% endmacro %}"
    + _HEAD
    + "{{ show(m.content) if m.content is defined }}"
    + _FOOT,
    "a variable for content": _HEAD + "{% set content = m.content %}{% if content is mapping or content is iterable "
    "and content is not string %}{{ content | map(attribute='text') | join(' ') }}{% else %}{{ content }}{% endif %}"
    + _FOOT,
    "the first part": _HEAD
    + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0]['text'] }}{% endif %}"
    + _FOOT,
    # calls
    "arguments by tojson": _calls("{{ c.function.arguments | tojson }}"),
    "arguments by items": _calls("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }},{% endfor %}"),
    "arguments by a filter": _calls("{% for k, v in c.function.arguments | dictsort %}{{ k }}={{ v }},{% endfor %}"),
    "arguments are a text": _calls("{{ '`' + c['function']['arguments'] + '`' }}"),
    "arguments are either": _calls(
        "{% set a = c.function.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}"
    ),
    "tools": "{% if tools %}{% for t in tools %}{{ t.function | tojson(indent=2) }}{% endfor %}{% endif %}"
    + _HEAD
    + _FOOT,
    # nulls, reasoning
    "asks for null content": _HEAD + "{% if m.content is not none %}{{ m.content }}{% else %}null"
    "{{ m.tool_calls | map(attribute='function.name') | join }}{% endif %}" + _FOOT,
    "asks for null calls": _HEAD + "{{ m.content }}{% if m.get('tool_calls') == none %}-{% else %}+{% endif %}" + _FOOT,
    "reasoning_content": _HEAD
    + "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    + _FOOT,
    "thinking": _HEAD + "{{ '(' + m.thinking + ')' if m.thinking is defined }}{{ m.content }}" + _FOOT,
    # further kinds
    "turns that must alternate": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "a namespace": "{% set ns = namespace(last='', seen=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.last = m.content %}{% set ns.seen = ns.seen + 1 %}{% endfor %}{{ ns.last }}:{{ ns.seen }}"
    "{{ enable_thinking | default(true) }}{{ documents | length if documents }}",
}
