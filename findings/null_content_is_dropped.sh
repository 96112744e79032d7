#!/usr/bin/env bash
# Guessed: transformers' apply_chat_template gives a chat template the messages as they are, so that a template which
#   asks `message['content'] is none` (the DeepSeek-R1 family does) renders the tool call of an assistant's turn that
#   came from an OpenAI client, whose content is null.
# Seen: it drops every key whose value is None first. `is none` is false of what is undefined, so the template takes
#   its other branch: the tool call vanishes from the prompt, without an error. The function below it,
#   render_jinja_template, keeps the null and renders the call.
# Exits 1 if that has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
"$place/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}"
    "{% for c in m.tool_calls %}<call {{ c.function.name }}>{% endfor %}"
    "{% else %}<{{ m.role }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CHAT = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
public = tokenizer.apply_chat_template(CHAT, chat_template=TEMPLATE, tokenize=False)
below = render_jinja_template(conversations=[CHAT], chat_template=TEMPLATE)[0][0]
print(f"transformers {transformers.__version__}")
print(f"apply_chat_template:   {public}")
print(f"render_jinja_template: {below}")
sys.exit((public, below) != ("<user>Rain?<assistant>", "<user>Rain?<call weather>"))
PYTHON
