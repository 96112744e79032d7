"""ConfigJson reads the keys of a Hugging Face config.json, and says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.rules import INT32_END

MOST_REPEATS = 4096  # of what is a loop here: layers, experts


class ConfigJson:
    """The keys that a file gives, over the defaults of its model class in transformers."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self.given, self.origin = given, origin
        self._all = {**defaults, **given}

    def __getitem__(self, key: str) -> Any:
        """What the key says or, where it is absent, what the model class means; None where that has no such key."""
        return self._all.get(key)

    def size(self, key: str, default: int | None = None, most: int = INT32_END - 1) -> int:
        """An integer in 1..most; `default` where the key says null or is absent.

        Raises:
            ConfigError: it is something else, or missing.
        """
        value = default if self[key] is None else self[key]
        if value is None:
            self.refuse(f"key {key!r} is missing")
        return self.integer(key, value, 1, most)

    def repeats(self, key: str) -> int:
        """How often something is repeated here: layers, experts. Raises: ConfigError, it is no such number."""
        return self.size(key, most=MOST_REPEATS)

    def count(self, key: str) -> int:
        """An integer that may be 0. Raises: ConfigError, it is something else."""
        return self.integer(key, self[key], 0, INT32_END - 1)

    def flag(self, key: str) -> bool:
        """True or false; false where it says null or is absent. Raises: ConfigError, it is something else."""
        value = self[key]
        if value is not None and not isinstance(value, bool):
            self.refuse(f"{key}: expected true or false, got {value!r}")
        return value is True

    def share(self, key: str) -> float:
        """A number in 0..1, without 1. Raises: ConfigError, it is something else."""
        value = self[key]
        if type(value) not in (int, float) or not 0 <= value < 1:
            self.refuse(f"{key}: expected a number >= 0 and < 1, got {value!r}")
        return float(value)

    def token_ids(self, key: str, value: object) -> tuple[int, ...]:
        """`value` of a key: an id, a list of ids or null. Raises: ConfigError, it is something else."""
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self.integer(key, token_id, 0, INT32_END - 1) for token_id in ids)

    def integer(self, key: str, value: object, least: int, most: int) -> int:
        """`value` of a key, checked. Raises: ConfigError, it is not an integer in least..most."""
        if type(value) is not int or not least <= value <= most:
            self.refuse(f"{key}: expected an integer in {least}..{most}, got {value!r}")
        return value

    def agreed(self, *names: str) -> Any:
        """The value of a setting that has several names; where the file gives none, the class's default of the first.

        Raises:
            ConfigError: the file gives two that differ.
        """
        value = agreed(self.given, names, self.origin)
        return self[names[0]] if value is None else value

    def refuse_if(self, used: object, what: str) -> None:
        """Raises: ConfigError, `used` says that the model needs `what`, which is not computed here."""
        if used:
            self.refuse(f"{what} is not supported")

    def refuse(self, why: str) -> NoReturn:
        """Raises: ConfigError, with the file's name."""
        raise ConfigError(f"{self.origin}: {why}")


def agreed(given: Mapping[str, Any], names: tuple[str, ...], origin: str) -> Any:
    """The value of a setting that has several names; None where all are absent or null.

    Raises:
        ConfigError: two of them differ.
    """
    values = {name: given[name] for name in names if given.get(name) is not None}
    if not values:
        return None
    (first, said), *others = values.items()
    for name, value in others:
        if value != said:
            raise ConfigError(f"{origin}: {first} {said!r} and {name} {value!r} say two things: keep one")
    return said
