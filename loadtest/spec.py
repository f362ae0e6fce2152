"""What people type: `kind:name=value,name=value`, read into the frozen data class of that kind."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class SpecError(ValueError):
    """What was typed cannot be meant; the message says what could."""


def parse(text: str, kinds: Mapping[str, type[T]]) -> T:
    """`kind` alone takes every default. Lists of numbers are written 1/2/3. Raises SpecError."""
    kind, _, rest = text.partition(":")
    if kind not in kinds:
        raise SpecError(f"{kind!r} is none of {', '.join(kinds)}")
    return parse_settings(rest, kinds[kind], what=kind)


def parse_settings(text: str, into: type[T], *, what: str) -> T:
    """`name=value,name=value`, which may be empty, as one of these. Raises SpecError."""
    hints = typing.get_type_hints(into)
    known = [field.name for field in fields(into)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise SpecError(f"{what}: {pair!r} is none of {', '.join(f'{each}=…' for each in known)}")
        try:
            values[name] = _convert(value, hints[name])
        except ValueError:
            raise SpecError(f"{what}: {value!r} is no value for {name}") from None
    try:
        return into(**values)
    except TypeError:
        missing = [name for name in known if name not in values]
        raise SpecError(f"{what} needs {', '.join(missing)}: such as {what}:{missing[0]}=…") from None
    except ValueError as error:
        raise SpecError(f"{what}: {error}") from None


def _convert(value: str, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        (of, _) = typing.get_args(hint)
        return tuple(_convert(part, of) for part in value.split("/"))
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    if hint not in (int, float, str, Path):
        raise TypeError(f"a setting of type {hint}")
    return hint(value)


def require(condition: bool, problem: str) -> None:  # noqa: FBT001 - reads as a sentence
    """Raises ValueError with the problem, which `parse` turns into a SpecError."""
    if not condition:
        raise ValueError(problem)
