"""What `pagestream generate` prints of an answer, of several, or of the events that they come in."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console

from pagestream.server.client import Answer, Client, summary
from pagestream.v1.generation_pb2 import GenerateStreamRequest


def print_answer(client: Client, request: GenerateStreamRequest) -> None:
    """The text to stdout as it comes, then a summary to stderr."""
    terminal = Console(stderr=True, highlight=False, soft_wrap=True)
    answer = Answer()
    try:
        answer.receive(client.stream(request), lambda text: typer.echo(text, nl=False), terminal)
    finally:
        if answer.text:
            typer.echo()  # what came of an answer that broke off ends in a line too
    if answer.finished:
        terminal.print(summary(answer.finished), style="dim")


def print_answers(client: Client, request: GenerateStreamRequest) -> None:
    """Each whole when it ends, under its index: streams that take turns could not be read."""
    terminal = Console(stderr=True, highlight=False, soft_wrap=True)
    texts: dict[int, str] = defaultdict(str)
    with closing(client.stream(request)) as events:
        for event in events:
            texts[event.delta.index] += event.delta.text
            if event.HasField("finished"):
                typer.echo(f"[{event.finished.index}] {texts[event.finished.index]}")
                terminal.print(summary(event.finished), style="dim")


def print_events(client: Client, request: GenerateStreamRequest) -> None:
    """Every event as a line of JSON."""
    with closing(client.stream(request)) as events:
        for event in events:
            typer.echo(MessageToJson(event, indent=None, preserving_proto_field_name=True))
