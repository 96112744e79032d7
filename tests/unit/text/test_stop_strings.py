"""StopStrings against a search at every end of the text so far: every text and stop strings over two letters."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from nanoflow_backend.text.stop_strings import StopStrings

WORDS = ["".join(letters) for length in (1, 2, 3, 4) for letters in product("ab", repeat=length)]
STOPS = [(), *((word,) for word in WORDS), *combinations(WORDS[:14], 2), ("aab", "ab", "abba"), ("b" * 9, "bba")]
TEXTS = ["".join(letters) for letters in product("ab", repeat=7)]
WIDTHS = (1, 2, 3, 7)


def shown_by(text: str, stops: tuple[str, ...], include: bool, first_end: int = 1) -> tuple[str, str | None]:
    """(what may be shown of a text so far, its stop string), by looking at every end."""
    for end in range(first_end, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    held = max((length for length in range(len(text) + 1) if text[len(text) - length :] in beginnings), default=0)
    return text if include else text[: len(text) - held], None


@pytest.mark.parametrize("include", [False, True])
def test_every_short_text(include: bool) -> None:
    for stops, text, width in product(STOPS, TEXTS, WIDTHS):
        strings, shown = StopStrings(stops, include), ""
        for start in range(0, len(text), width):
            shown += strings.feed(text[start : start + width])
            assert (shown, strings.matched) == shown_by(text[: start + width], stops, include)
            if strings.matched is not None:
                break
        else:
            assert shown + strings.release() == text


@pytest.mark.parametrize("include", [False, True])
def test_what_may_not_stop_yet(include: bool) -> None:
    for stops, text, free in product(STOPS, TEXTS[::5], (2, 3)):
        strings, shown = StopStrings(stops, include), ""
        for end, character in enumerate(text, 1):
            shown += strings.feed(character, may_stop=end > free)
            assert (shown, strings.matched) == shown_by(text[:end], stops, include, first_end=free + 1)
            if strings.matched is not None:
                break
