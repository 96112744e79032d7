"""ConfigError is what bad settings raise, wherever they are found."""


class ConfigError(ValueError):
    """A configuration cannot be used: the message names the file, the key and what was expected."""
