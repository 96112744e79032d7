#!/bin/bash
# What llguidance 1.9.1 makes of numbers in a JSON schema.
#
# Guessed: a JSON schema's `const` holds the output to that number, and `exclusiveMinimum: 0` to numbers above 0.
# Seen: numbers become doubles, without a word.
# * `const` 1234567890123456789 takes 1234567890123456768, and not the number itself.
# * `maximum` 2^53+1 shuts out 2^53+1; `exclusiveMinimum` 2^53 takes 2^53; a long fraction loses its last digits.
# And far from any limit of doubles:
# * An integer that `exclusiveMinimum` or `exclusiveMaximum` names is taken if the opposite bound is a fraction less
#   than 1 away: {"exclusiveMinimum": 0, "maximum": 0.5} takes 0. Beside `maximum` 1 it is shut out, as it should be.
# * `multipleOf` with nine decimals, such as 3e-9, shuts out numbers that are multiples; with eight it does not.
#
# Exits 1 if that changes. Needs Python 3 with venv, and pip's index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

import llguidance
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
end = tokenizer.token_to_id("<end>")
ids = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=end + 1, eos_token=[end])


def takes(schema: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(ids, llguidance.LLMatcher.grammar_from_json_schema(schema))
    return all(matcher.try_consume_tokens([token]) for token in tokenizer.encode(text).ids) and matcher.is_accepting()


print("llguidance", llguidance.__version__)
BIG = 1234567890123456789
SEEN = [  # schema, text, whether it is valid, whether it is taken
    ({"const": BIG}, str(BIG), True, False),
    ({"const": BIG}, str(BIG - 21), False, True),
    ({"enum": [2**53 + 1]}, str(2**53 + 1), True, False),
    ({"type": "integer", "maximum": 2**53 + 1}, str(2**53 + 1), True, False),
    ({"type": "integer", "exclusiveMinimum": 2**53}, str(2**53), False, True),
    ('{"const": 0.12345678901234567890}', "0.12345678901234568", False, True),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0", False, True),
    ({"type": "number", "exclusiveMinimum": 3, "maximum": 3.5}, "3", False, True),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0", False, False),
    ({"type": "number", "multipleOf": 3e-9}, "37.037036703", True, False),
    ({"type": "number", "multipleOf": 3e-8}, "370.37036703", True, True),
]
changed = 0
for schema, text, valid, taken in SEEN:
    schema = schema if isinstance(schema, str) else json.dumps(schema)
    found = takes(schema, text)
    changed += found is not taken
    print(f"{schema:62} {text:20} valid: {valid!s:5} taken: {found}")
sys.exit(bool(changed))
PYTHON
