"""RankError says which rank or host has ended, and how, where what others compute with it cannot go on."""

from __future__ import annotations


class RankError(RuntimeError):
    """The message names the rank or the host, and says what is known of its end."""
