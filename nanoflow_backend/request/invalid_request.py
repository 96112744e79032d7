"""InvalidRequest is the error of a request that is its client's fault."""


class InvalidRequest(ValueError):
    """The message names the field and what was expected."""
