"""What is measured must never end what is served."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


def contained(default: T) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that returns `default` where it would raise; the log has the first time of each."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        has_failed = False

        @functools.wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> T:
            nonlocal has_failed
            try:
                return function(*arguments, **named)
            except Exception:
                if not has_failed:
                    log.exception(
                        "%s failed: its figures are missing from now on, answers go on", function.__qualname__
                    )
                has_failed = True
                return default

        return call

    return decorate
