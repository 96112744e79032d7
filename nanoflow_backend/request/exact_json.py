"""This module reads and writes JSON exactly: with every digit of its numbers and every key of its objects."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

_encoder = msgspec.json.Encoder(decimal_format="number")


class InexactJson(ValueError):
    """The text is no JSON, or no reading of it keeps all that it says."""


def loads(text: str) -> Any:
    """The value of a JSON text: a number is an int, a float that stands for exactly its digits, or else a Decimal.

    NaN and Infinity are floats, as in the standard library: whoever wants a number refuses them by the field's name.

    Raises:
        InexactJson: it is not valid JSON, an object has a key twice, or it is nested deeper or a number is longer than
            can be read.
    """
    try:
        return json.loads(text, parse_float=_number, object_pairs_hook=_object)
    except RecursionError:
        raise InexactJson("nested too deeply") from None
    except InvalidOperation:
        raise InexactJson("a number's exponent is too large") from None
    except InexactJson:
        raise
    except ValueError as error:
        raise InexactJson(str(error)) from None


def dumps(value: Any) -> str:
    """The JSON text of a value that `loads` gave, without a digit lost.

    Raises:
        InexactJson: it is nested too deeply, has a text that is not valid Unicode, or a float that JSON cannot write.
    """
    try:
        _refuse_non_finite(value)
        return _encoder.encode(value).decode()
    except RecursionError:
        raise InexactJson("nested too deeply") from None
    except (UnicodeError, TypeError, msgspec.MsgspecError) as error:
        raise InexactJson(str(error)) from None


def is_exact(number: int | float | Decimal) -> bool:
    """Whether arithmetic in doubles, as most programs read JSON, keeps this number and its neighbours apart."""
    return not isinstance(number, Decimal) and abs(number) < 2**53


def _number(text: str) -> float | Decimal:
    value = float(text)
    exact = Decimal(text)
    return value if Decimal(repr(value)) == exact else exact


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise InexactJson(f"an object has the key {twice!r} twice")
    return value


def _refuse_non_finite(value: Any) -> None:
    """msgspec would write null."""
    if isinstance(value, dict):
        for item in value.values():
            _refuse_non_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_non_finite(item)
    elif isinstance(value, float) and not -float("inf") < value < float("inf"):
        raise InexactJson(f"{value} is not a JSON number")
