"""This module finds the JSON schemas that a Lark grammar embeds, as `%json {...}`."""

from __future__ import annotations

import json
import re

from nanoflow_backend.request.invalid_request import InvalidRequest
from nanoflow_backend.sampling.json_schema import OPTIONS, enforceable

# A text, a regex or a comment, in which `%json` says nothing; or that which does.
_PIECE = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|(?P<json>%json\s*)')


def with_enforceable_schemas(grammar: str) -> str:
    """The grammar with each schema in it as `enforceable` has it.

    Raises:
        InvalidRequest: one of them would not be enforced.
    """
    pieces, position = [], 0
    while match := _PIECE.search(grammar, position):
        end = match.end()
        pieces.append(grammar[position:end])
        if match["json"]:
            start = end
            try:
                _, end = json.JSONDecoder().raw_decode(grammar, start)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"structured_outputs.grammar: %json: expected a JSON schema: {error}") from None
            schema = json.loads(enforceable(grammar[start:end], "structured_outputs.grammar: %json"))
            pieces.append(json.dumps({**schema, "x-guidance": OPTIONS}))
        position = end
    return "".join(pieces) + grammar[position:]
