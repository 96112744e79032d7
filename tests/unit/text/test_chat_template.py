"""Chat templates against transformers, with templates in the shape of well-known models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.text.own_templates import TEMPLATES
from transformers import PreTrainedTokenizerFast

from benchmarks.accuracy.chat_templates import BAD, TOKENS, compare, generation_prompts
from benchmarks.accuracy.conversations import CONVERSATIONS, Conversation
from benchmarks.models.tiny_tokenizers import llama3
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_template import ChatTemplate
from nanoflow_backend.text.tokenizer import Tokenizer

LLAMA3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""

TOOLS = """{%- set ns = namespace(calls=0) %}
{{- bos_token }}
{%- if tools is not none and tools %}
    {{- "# Tools\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\n" }}
        {{- tool.function.parameters | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if message.role == "ignored" %}
        {% continue %}
    {% endif %}
    {% if message.tool_calls is defined %}
        {% set ns.calls = ns.calls + message.tool_calls | length %}
<tool_call>{{ message.tool_calls[0].function | tojson }}</tool_call>
    {% else %}
{{ message.role }}: {% generation %}{{ message.content }}{% endgeneration %}

    {% endif %}
    {% if message.role == "end" %}
        {% break %}
    {% endif %}
{% endfor %}
calls: {{ ns.calls }}, thinking: {{ enable_thinking | default(true) }}, year: {{ strftime_now("%Y")[:2] }}
{%- if documents %}documents{% endif %}
"""

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  Héllo 👋 \n"},
    {"role": "assistant", "content": "Hi", "tool_calls": None},
    {"role": "user", "content": "{{ bos_token }} {% raw %}"},
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "1 < 2?"},
    {"role": "ignored", "content": "never shown"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "less", "arguments": {"a": 1, "b": "<é>"}}}],
    },
    {"role": "end", "content": "yes"},
    {"role": "user", "content": "never shown"},
]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "less", "parameters": {"type": "object", "z": "<&>", "a": "é"}},
}

TOOL_LISTS: list[Any] = [None, [], [TOOL]]


def _load(folder: Path, template: object) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    file = llama3(folder) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return Tokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "extra"),
    [
        (LLAMA3, CHAT, {}),
        (CHATML, CHAT, {}),
        (CHATML, CHAT[1:], {}),
        (MISTRAL, CHAT, {}),
        (TOOLS, CHAT, {}),
        (TOOLS, TOOL_CHAT, {"tools": [TOOL]}),
        (TOOLS, TOOL_CHAT, {"tools": [], "enable_thinking": False, "documents": [{"title": "t", "text": "x"}]}),
    ],
    ids=["llama3", "chatml", "chatml-default-system", "mistral", "no-tools", "tools", "extra"],
)
def test_renders_as_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, Any]], extra: dict[str, Any], generation: bool
) -> None:
    tokenizer, reference = _load(tmp_path, template)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **extra)
    variables = {name: value for name, value in extra.items() if name != "tools"}
    text = tokenizer.apply_chat_template(messages, extra.get("tools"), generation, variables)
    assert text == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False, **extra)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    if "{{- bos_token" in template or "bos_token +" in template:
        assert tokenizer.encode(text) == ids  # still one BOS


def test_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    tokenizer, reference = _load(tmp_path, templates)
    for tools in TOOL_LISTS:
        expected = reference.apply_chat_template(TOOL_CHAT[:1], tools=tools, tokenize=False)
        assert tokenizer.apply_chat_template(TOOL_CHAT[:1], tools, add_generation_prompt=False) == expected


def test_template_files_go_before_the_config(tmp_path: Path) -> None:
    llama3(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    tokenizer, reference = _load(tmp_path, CHATML)
    for tools in TOOL_LISTS:
        expected = reference.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert tokenizer.apply_chat_template(CHAT, tools, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: expected a list of at least one message"),
        ("hello", "messages: expected a list of at least one message"),
        (["hello"], r'messages\[0\]: expected an object with a "role", got \'hello\''),
        ([CHAT[1], {"content": "x"}], r'messages\[1\]: expected an object with a "role"'),
        ([CHAT[1], CHAT[1]], "refuses them: Conversation roles must alternate"),
        ([{"role": "user", "content": 3}], "refuses them: can only concatenate str"),
        ([{"role": "user"}], "refuses them: .*no attribute 'content'"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, complaint: str) -> None:
    tokenizer, _ = _load(tmp_path, MISTRAL)
    with pytest.raises(InvalidRequest, match=complaint):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_kind_of_template_renders_each_kind_of_conversation_as_transformers(name: str) -> None:
    template, outcomes = ChatTemplate(TEMPLATES[name], TOKENS), set()
    for title, conversation in CONVERSATIONS.items():
        for generation in generation_prompts(conversation):
            outcome, why = compare(template, TEMPLATES[name], conversation, generation)
            assert outcome not in BAD, (title, why)
            outcomes.add(outcome)
    assert "equal" in outcomes


def test_what_the_comparison_calls_bad_is_bad() -> None:
    conversation = Conversation([{"role": "user", "content": "Hello"}])
    other = ChatTemplate("{{ messages[0].content }}!", TOKENS)
    assert compare(other, "{{ messages[0].content }}", conversation, False)[0] == "different"
    refusing = ChatTemplate("{{ raise_exception('no') }}", TOKENS)
    assert compare(refusing, "{{ messages[0].content }}", conversation, False)[0] == "the engine refuses"
    assert compare(other, "{{ raise_exception('no') }}", conversation, False)[0] == "transformers refuses"
    assert compare(refusing, "{{ raise_exception('no') }}", conversation, False)[0] == "both refuse"


def test_variables_go_before_special_tokens() -> None:
    template = ChatTemplate(
        "{{ bos_token }}|{{ eos_token }}|{{ image_token }}", {"bos_token": "<s>", "image_token": "<i>"}
    )
    assert template.render(CHAT) == "<s>||<i>"
    assert template.render(CHAT, variables={"bos_token": "", "eos_token": "<e>"}) == "|<e>|<i>"


@pytest.mark.parametrize(
    ("final", "field"),
    [
        ({"content": "Hi"}, True),
        ({"content": " Hi, \n "}, True),
        ({"content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there "}]}, "content"),
        ({"content": "2", "reasoning_content": "Add "}, "reasoning_content"),
        ({"content": "2", "thinking": "Add "}, "thinking"),
    ],
)
@pytest.mark.parametrize("name", ["text, trimmed", "a text or parts", "reasoning_content", "thinking"])
def test_a_final_message_is_continued_as_in_transformers(name: str, final: dict[str, Any], field: Any) -> None:
    conversation = Conversation([CHAT[1], {"role": "assistant", **final}], None, {"continue_final_message": field})
    outcome, why = compare(ChatTemplate(TEMPLATES[name], TOKENS), TEMPLATES[name], conversation, False)
    assert outcome not in BAD, why


def test_a_continued_message_needs_no_generation_prompt() -> None:
    template = ChatTemplate(TEMPLATES["text, joined"], TOKENS)
    messages = [CHAT[1], {"role": "assistant", "content": "Hi"}]
    assert template.render(messages, variables={"continue_final_message": True}).endswith("<assistant>(Hi")
    assert template.render(messages, variables={"continue_final_message": False}).endswith(
        "<assistant>(Hi)</s><assistant>"
    )


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"messages": []}, "chat_template_kwargs: expected no messages"),
        ({"tools": []}, "chat_template_kwargs: expected no tools: there is an input of that name"),
        ({"tokenize": False}, "chat_template_kwargs: expected no tokenize"),
        ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs: expected no chat_template: the model's own is used"),
        ({"max_length": 9}, "chat_template_kwargs: expected no max_length: a conversation is never cut"),
        ({"documents": "x"}, "chat_template_kwargs: documents: expected a list of objects, got 'x'"),
        ({"documents": ["x"]}, r"chat_template_kwargs: documents\[0\]: expected an object, got 'x'"),
        ({"continue_final_message": 2}, "continue_final_message: expected a boolean or a field's name, got 2"),
        (
            {"continue_final_message": "thinking"},
            "continue_final_message: expected a text in the final message's thinking",
        ),
        ({"continue_final_message": "role"}, "continue_final_message: the model's chat template does not show"),
    ],
)
def test_orders_are_obeyed_or_refused_by_name(variables: dict[str, Any], complaint: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ tokenize }}{{ max_length }}", {})
    with pytest.raises(InvalidRequest, match=complaint):
        template.render(CHAT[1:2], variables=variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for k, v in messages[1].content | dictsort %}{% endfor %}",  # AttributeError
        "{{ messages[1].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | groupby('missing') }}{{ {} | first + 1 }}",
    ],
)
def test_whatever_a_template_raises_is_about_the_messages(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"messages: the model's chat template refuses them: ."):
        ChatTemplate(source, {}).render(CHAT)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(llama3(tmp_path))
    with pytest.raises(InvalidRequest, match="no default chat template"):
        tokenizer.apply_chat_template(CHAT)
