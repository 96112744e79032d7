"""Inputs reads the input tensors of one request as flags, texts and JSON; what cannot be read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.serving.tensors import Arrays


class Inputs:
    """The tensors that were sent, of any shape, with the dtypes of `tensors.INPUTS`; strings are bytes objects.

    Each reader raises InvalidRequest, which names the input and what was expected; KeyError if it was not sent.
    """

    def __init__(self, tensors: Arrays) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def flat(self, name: str) -> NDArray[Any]:
        """All elements, in row-major order."""
        return self._tensors[name].ravel()

    def flag(self, name: str) -> bool | None:
        """The one element of a BOOL; None if it was not sent."""
        return bool(self._only(name)) if name in self._tensors else None

    def text(self, name: str) -> str:
        """The one element of a BYTES, decoded."""
        self._only(name)
        return self.texts(name)[0]

    def texts(self, name: str) -> list[str]:
        """All elements of a BYTES, decoded. Raises: InvalidRequest, one is no UTF-8."""
        try:
            return [item if isinstance(item, str) else item.decode() for item in self.flat(name).tolist()]
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name}: expected UTF-8 text: {error}") from None

    def json(
        self,
        name: str,
        kind: type[dict[str, Any]] | type[list[Any]],
        decode: Callable[[str], Any] = json.loads,
    ) -> Any:
        """The JSON object or list in the one element of a BYTES. `decode` raises ValueError where there is none.

        Raises: InvalidRequest, naming the input.
        """
        text = self.text(name)
        try:
            value = decode(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name}: not valid JSON: {error}") from None
        if not isinstance(value, kind):
            raise InvalidRequest(f"{name}: expected a JSON {'object' if kind is dict else 'list'}, got {text[:80]}")
        return value

    def _only(self, name: str) -> Any:
        if self._tensors[name].size != 1:
            raise InvalidRequest(f"{name}: expected one element, got shape {list(self._tensors[name].shape)}")
        return self._tensors[name].flat[0]


def is_cancellation(tensors: Arrays) -> bool:
    """Whether a request is there to end others: it has `cancel` and nothing else.

    Raises:
        InvalidRequest: there is something else.
    """
    if not Inputs(tensors).flag("cancel"):
        return False
    if others := [name for name in tensors if name != "cancel"]:
        raise InvalidRequest(f"cancel: expected no other input, got {', '.join(others)}")
    return True
