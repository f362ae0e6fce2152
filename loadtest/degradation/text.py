"""Real text without a network: the help topics that come with Python."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from itertools import islice
from pydoc_data.topics import topics

from pagestream.loadtest.degradation.server import Server

NAME = f"pydoc_data.topics of Python {platform.python_version()}"


def read_text(server: Server, tokens: int) -> list[int]:
    """The first so many tokens of all topics in order of their names; fewer if there are no more."""
    return list(islice(_tokens(server), tokens))


def _tokens(server: Server) -> Iterator[int]:
    for name in sorted(topics):
        yield from server.encode(topics[name] + "\n")


def words_of(server: Server, text: list[int]) -> list[int]:
    """Token ids that are a word with a space before it: what random sequences are drawn from, for every sequence of
    them is a text that the tokenizer could have made."""
    return [token for token in sorted(set(text)) if re.fullmatch(r" [a-z]{3,}", server.decode([token]))]
