"""StructuredOutputs is the form that a request's output must have, in vLLM's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from nanoflow_backend.request import exact_json
from nanoflow_backend.request.exact_json import InexactJson
from nanoflow_backend.request.invalid_request import InvalidRequest

MOST_CHARACTERS = 65536  # of a schema, a grammar or all choices together
MOST_CHOICES = 1000
KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Exactly one of the five kinds is set.

    `json` is a JSON schema as text, `grammar` one in Lark's or in llama.cpp's notation (GBNF), `json_object` any JSON
    object. What is no known grammar is found out by compiling it, in the engine.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False  # of json and json_object
    whitespace_pattern: str | None = None  # a regex, of json and json_object

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"structured_outputs: expected exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}"
            )
        kind = given[0]
        if not getattr(self, kind):
            raise InvalidRequest(f"structured_outputs.{kind}: expected it not to be empty or false")
        texts = self.choice or () if kind == "choice" else () if self.json_object else (getattr(self, kind),)
        text = "".join(texts) + (self.whitespace_pattern or "")
        if len(text) > MOST_CHARACTERS or len(texts) > MOST_CHOICES:
            raise InvalidRequest(
                f"structured_outputs.{kind}: expected at most {MOST_CHARACTERS} characters and {MOST_CHOICES} choices, "
                f"got {len(text)} and {len(texts)}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell a lone surrogate
            raise InvalidRequest(f"structured_outputs.{kind}: expected valid Unicode text: {error}") from None

    @classmethod
    def parse(cls, value: Any) -> StructuredOutputs:
        """From a client's object, or from its JSON text; a schema may be an object or text.

        Raises:
            InvalidRequest: naming the field and what was expected.
        """
        fields = decoded(value, "structured_outputs")
        if not isinstance(fields, Mapping):
            raise InvalidRequest(f"structured_outputs: expected an object, got {value!r}")
        # `_backend...` are vLLM's own: the server's OpenAI frontend writes the whole object out.
        known = {name: f for name, f in fields.items() if f is not None and not name.startswith("_backend")}
        if known.pop("disable_fallback", False) not in (True, False, "true", "false"):  # there is one library
            raise InvalidRequest("structured_outputs.disable_fallback: expected true or false")
        for name in ("disable_additional_properties", "structural_tag"):  # vLLM's other names
            if known.pop(name, False) not in (False, "false"):
                raise InvalidRequest(f"structured_outputs.{name}: not implemented; expected it not to be set")
        if isinstance(known.get("json"), Mapping | bool):
            try:
                known["json"] = exact_json.dumps(known["json"])
            except InexactJson as error:
                raise InvalidRequest(f"structured_outputs.json: expected a JSON schema: {error}") from None
        if known.get("json_object") in (False, "false"):
            del known["json_object"]
        try:
            return msgspec.convert(known, cls, strict=False)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, InvalidRequest):
                raise error.__cause__ from None
            reason, _, path = str(error).partition(" - at `$")
            raise InvalidRequest(f"structured_outputs{path.rstrip('`')}: {reason}") from None

    @classmethod
    def from_older_names(cls, fields: dict[str, Any]) -> StructuredOutputs | None:
        """Take `guided_json`, `guided_regex`, ... and `guided_decoding` of older clients out of `fields`.

        Raises: InvalidRequest, naming the field.
        """
        older: dict[str, Any] = {}
        for name in [name for name in fields if name.startswith("guided_")]:
            value = fields.pop(name)
            kind = name.removeprefix("guided_")
            if value is None or kind == "decoding_backend" or (kind == "json_object" and value in (False, "false")):
                continue
            if kind == "decoding":
                inner = decoded(value, name)
                if not isinstance(inner, Mapping):
                    raise InvalidRequest(f"{name}: expected an object, got {value!r}")
                older |= {key: field for key, field in inner.items() if key != "backend"}
            elif kind in (*KINDS, "whitespace_pattern"):
                older[kind] = decoded(value, name) if kind == "choice" else value
            else:
                raise InvalidRequest(f"{name}: unknown sampling parameter; the current name is structured_outputs")
        return cls.parse(older) if older else None


def decoded(value: Any, name: str) -> Any:
    """A request's parameter is a number or a text: objects and lists come as JSON in one.

    Raises: InvalidRequest, it is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return exact_json.loads(value)
    except InexactJson as error:
        raise InvalidRequest(f"{name}: not valid JSON: {error}") from None
