"""Messages of a chat become the prompt of a call, or are refused by name."""

import pytest
from support.serving.parsed_call import parse

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.tokenizer import Tokenizer

CHAT = '[{"role": "user", "content": "the dog"}]'


CONTINUED = '{"bos_token": "", "continue_final_message": true}'


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tokenizer whose chat template shows all that it is given."""
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("chatty"))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{{ tools | tojson }} {{ mood }}{% if add_generation_prompt %} assistant:{% endif %}"
    )
    return Tokenizer.from_pretrained(folder)


def test_chat_template_kwargs_go_before_special_tokens_and_may_continue_the_final_message(chatty):
    call = parse(chatty, messages=CHAT, chat_template_kwargs=CONTINUED)
    assert chatty.decode(call.prompt, skip_special_tokens=False) == "user: the dog"


@pytest.mark.parametrize(
    ("inputs", "end"),
    [
        ({}, "null  assistant:"),
        ({"tools": '[{"name": "f"}]', "add_generation_prompt": False}, '[{"name": "f"}] '),
        ({"chat_template_kwargs": '{"mood": "calm"}'}, "null calm assistant:"),
    ],
)
def test_messages_go_through_the_chat_template(chatty, inputs, end):
    call = parse(chatty, messages=CHAT, **inputs)
    assert chatty.decode(call.prompt, skip_special_tokens=False) == f"<|begin_of_text|>user: the dog\n{end}"
    assert call.prompt.count(chatty.bos_id) == 1
    assert (call.shown_prompt, call.outputs) == ("", {"text_output"})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"messages": CHAT, "text_input": "a"}, "expected one of them, got text_input and messages"),
        ({"text_input": "a", "tools": "[]"}, "tools: expected it with messages only"),
        ({"input_ids": [1], "add_generation_prompt": True}, "add_generation_prompt: expected it with messages only"),
        ({"messages": "hello"}, "messages: not valid JSON"),
        ({"messages": "{}"}, "messages: expected a JSON list"),
        ({"messages": "[]"}, "messages: expected a list of at least one message"),
        ({"messages": '[{"content": "x"}]'}, r'messages\[0\]: expected an object with a "role"'),
        ({"messages": CHAT, "tools": "{}"}, "tools: expected a JSON list"),
        ({"messages": CHAT, "tools": '["f"]'}, r"tools\[0\]: expected an object, got 'f'"),
        ({"messages": CHAT, "chat_template_kwargs": "[]"}, "chat_template_kwargs: expected a JSON object"),
        ({"messages": CHAT, "chat_template_kwargs": '{"messages": []}'}, "chat_template_kwargs: expected no messages"),
        ({"messages": CHAT, "chat_template_kwargs": '{"tokenize": false}'}, "kwargs: expected no tokenize"),
        (
            {"messages": CHAT, "add_generation_prompt": True, "chat_template_kwargs": CONTINUED},
            "continue_final_message: expected add_generation_prompt to be false with it",
        ),
        ({"messages": CHAT, "exclude_input_in_output": False}, "exclude_input_in_output: expected true, or nothing"),
    ],
)
def test_bad_messages_are_refused(chatty, inputs, message):
    with pytest.raises(InvalidRequest, match=message):
        parse(chatty, **inputs)


def test_messages_need_a_template(tokenizer):
    with pytest.raises(InvalidRequest, match="messages: the model has no default chat template"):
        parse(tokenizer, messages=CHAT)
    with pytest.raises(InvalidRequest, match=r"messages: expected none, for the model has no tokenizer\.json"):
        parse(None, messages=CHAT)
