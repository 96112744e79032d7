"""InvalidRequest: the caller's fault."""


class InvalidRequest(ValueError):
    """The message names the field and what was expected."""
