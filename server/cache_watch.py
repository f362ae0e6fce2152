"""Tells other threads what the prefix cache holds: each who watches, its own tenant's full pages as they come and go.

The engine's thread writes, anybody reads. Who does not read for long starts anew from what is there then, so memory
is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagestream.server.block_pool import BlockPool
from pagestream.server.prefix_tree import FullPage

MAX_UNREAD = 10_000  # changes


@dataclass(frozen=True, slots=True)
class Changes:
    """In order: first, if `starts_anew`, all known before is void; then pages that came, and numbers that went."""

    starts_anew: bool
    changes: Sequence[FullPage | int]


@dataclass(slots=True, eq=False)
class Watch:
    """What one watcher has not read yet."""

    tenant: str
    starts_anew: bool = True
    unread: list[FullPage | int] = field(default_factory=list)


class CacheWatch:
    """The prefix tree's watcher, there only while somebody watches. All but `read` runs on the engine's thread, by
    Inbox.ask."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._watches: list[Watch] = []
        self._lock = threading.Lock()

    def open(self, tenant: str) -> Watch:
        watch = Watch(tenant, unread=list(self._pool.full_pages(tenant)))
        self._watches.append(watch)
        self._pool.watch(self)
        return watch

    def close(self, watch: Watch) -> None:
        self._watches.remove(watch)
        if not self._watches:
            self._pool.watch(None)

    def flush(self) -> int:
        """Forgets all that nobody holds. Returns how many blocks are free then."""
        return self._pool.flush()

    def read(self, watch: Watch) -> Changes:
        """What happened since the last time. Any thread."""
        with self._lock:
            changes, watch.unread = watch.unread, []
            starts_anew, watch.starts_anew = watch.starts_anew, False
        return Changes(starts_anew, changes)

    def stored(self, salt: str, page: FullPage) -> None:
        self._add(salt, page)

    def removed(self, salt: str, number: int) -> None:
        self._add(salt, number)

    def _add(self, salt: str, change: FullPage | int) -> None:
        with self._lock:
            for watch in self._watches:
                if watch.tenant != salt:
                    continue
                watch.unread.append(change)
                if len(watch.unread) > MAX_UNREAD:
                    watch.starts_anew, watch.unread = True, list(self._pool.full_pages(salt))
