"""What can be wrong with a model on disk or with the memory it wants. Each message is one clear sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelError(Exception):
    """The model cannot be loaded; the message names the file, key or tensor and what to do."""


class UnsupportedModelError(ModelError):
    """A config key, tensor or value that this code does not understand, named in the message."""


class NotEnoughMemoryError(ModelError):
    """Weights, activations and KV cache do not fit; the message names the sizes and the knobs."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Files are foreign: whatever a value of the wrong kind or size inside one breaks is a ModelError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged or makes no sense ({type(error).__name__}: {error})") from error
