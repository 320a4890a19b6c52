"""What a wrong setting raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe, key or value that cannot be used; the message says which, and what to write
    instead.
    """


def require(holds: bool, key: str, expected: str, got: object) -> None:
    """Raises ConfigError, by name, where a key's value does not hold."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
