"""replaced puts another function in a method's place for a while: what is traced has no line of code for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


@contextmanager
def replaced(owner: object, method: str, by: Callable[..., Any]) -> Iterator[None]:
    """Calls of owner.method(...) become by(call, ...), `call` being the method as it was.

    `owner` is an object, or a class of which it is a class method or a static one.
    """
    call, own = getattr(owner, method), vars(owner).get(method)

    @wraps(call)
    def instead(*args: Any, **keywords: Any) -> Any:
        return by(call, *args, **keywords)

    setattr(owner, method, instead)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)  # its class has it
        else:
            setattr(owner, method, own)
