"""Reads a model's settings so that none goes unnoticed: what is not asked for is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pagestream.model.errors import ModelError, UnsupportedModelError


class StrictKeys:
    """One mapping of settings, read key by key. `source` says in messages where it came from.

    Every getter without a default raises ModelError for a missing key, and all of them for a value of another type.
    """

    def __init__(self, source: str, values: Mapping[str, object]) -> None:
        self._source = source
        self._values = values
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> object:
        """The value as it is; None where the key is missing or null."""
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int | None = None) -> int:
        value = self.optional_integer(key, minimum=minimum)
        value = default if value is None else value
        if value is None:
            raise self._missing(key)
        if maximum is not None and value > maximum:
            raise UnsupportedModelError(f"{self._source}: {key} {value} is not supported, only up to {maximum}")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ModelError(f"{self._source}: {key} must be a whole number of at least {minimum}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.optional_number(key)
        value = default if value is None else value
        if value is None:
            raise self._missing(key)
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self._source}: {key} must be a positive number, not {value!r}")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self._source}: {key} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or several; empty where the key is missing or null."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise ModelError(f"{self._source}: {key} must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def only(self, key: str, supported: object) -> None:
        """Raises UnsupportedModelError where the key is there with another value."""
        value = self.get(key)
        if key in self._values and value != supported:
            raise UnsupportedModelError(f"{self._source}: {key} {value!r} is not supported, only {supported!r}")

    def ignore(self, keys: Iterable[str]) -> None:
        self._read.update(keys)

    def finish(self) -> None:
        """Raises UnsupportedModelError naming the keys that were never read."""
        unread = sorted(self._values.keys() - self._read)
        if unread:
            raise UnsupportedModelError(f"{self._source}: not understood, so not guessed at: {', '.join(unread)}")

    def _missing(self, key: str) -> ModelError:
        return ModelError(f"{self._source}: the key {key} is missing")
