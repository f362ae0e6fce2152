"""Files that may change while the server runs: certificates and keys are rotated without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Reloaded(Generic[T]):
    """What `load` makes of files, made again when one of them has changed. Any thread may ask.

    A change that cannot be loaded is logged once, and what was loaded before stays in use: half of a rotation must not
    close the door. `load` raises OSError, at the start from the constructor.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._value = load()

    def get(self) -> T:
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps  # taken before the files are read: what changes meanwhile is read again
                try:
                    self._value = self._load()
                except OSError as error:
                    log.warning("%s; what was loaded before stays in use", error)
                else:
                    log.info("loaded again: %s", ", ".join(map(str, self._files)))
            return self._value

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes with the file's content, also behind a link as Kubernetes mounts secrets; None if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
