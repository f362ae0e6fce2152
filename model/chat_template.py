"""A model's chat template: messages to the text that the model was trained on, in the dialect of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagestream.model.errors import ModelError

_MAX_WORK = 200_000  # loop rounds and calls in one rendering: about a second of work, chats of thousands of messages
_WORK = "work counter"  # no template can name a variable with a space in it


class TemplateError(Exception):
    """The template refused these messages, or failed on them; in its own words."""


class ChatTemplate:
    """One compiled template. Rendering is safe from any thread.

    A template comes with the model and is foreign code: the sandbox keeps it from the interpreter's internals, `range`
    is limited to 100,000 and loop rounds and calls together to 200,000, so that no loop or recursion runs for ever.
    The size of a single expression (`'a' * 10**9`) is not limited.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables for the template, such as bos_token. Raises ModelError for bad syntax."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.filters["counted"] = _counted
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(
                    loop.iter, "counted", [], [], None, None, lineno=loop.lineno, environment=environment
                )
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template cannot be compiled: line {error.lineno}: {error.message}") from error
        self._template = jinja2.Template.from_code(environment, code, environment.globals)
        self.source = source
        self.special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat as text, special tokens included. Messages have `role` and `content`. Raises TemplateError."""
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _WORK: count(1),
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # foreign code: it can raise anything, and all of it means the same
            raise TemplateError(str(error) or type(error).__name__) from error


class _Environment(ImmutableSandboxedEnvironment):
    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _count(context)
        return super().call(context, obj, *args, **kwargs)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is what it contains."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count(context)
        yield item


def _count(context: Context) -> None:
    if next(context[_WORK]) > _MAX_WORK:
        raise jinja2.TemplateError(f"the chat template did not end within {_MAX_WORK:,} loop rounds and calls")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass these by position too
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Unlike Jinja's own filter, no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
