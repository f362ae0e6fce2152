"""Lets in who has a key, and no more of their calls at once than it allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pagestream.server.errors import KeyBusyError, UnauthenticatedError
from pagestream.server.keys import ANYBODY, Key, KeyFile

_RETRY_SECONDS = 1.0


class Door:
    """Used on the event loop only. Without a file of keys it is open to anybody."""

    def __init__(self, keys: KeyFile | None = None) -> None:
        self._keys = keys
        self._inside: Counter[str] = Counter()  # calls by key

    def identify(self, metadata: Mapping[str, str | bytes]) -> Key:
        """Raises UnauthenticatedError, which says nothing of what was sent."""
        if self._keys is None:
            return ANYBODY
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        key = self._keys.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise UnauthenticatedError(
                "the metadata `authorization: Bearer TOKEN` is missing or its token is not known"
            )
        return key

    def enter(self, key: Key) -> None:
        """Raises KeyBusyError; whoever entered must leave."""
        if key.max_requests is not None and self._inside[key.name] >= key.max_requests:
            raise KeyBusyError(f"{key.max_requests} calls of this key are running, its most", _RETRY_SECONDS)
        self._inside[key.name] += 1

    def leave(self, key: Key) -> None:
        self._inside[key.name] -= 1
