"""A chat in the terminal. The server keeps nothing between answers: the whole conversation travels each time."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from rich.console import Console

from pagestream.server.client import Answer, CallError, Client, summary
from pagestream.v1.generation_pb2 import Chat, ChatMessage, GenerateStreamRequest, SamplingConfig, StopConfig

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def run_chat(client: Client, sampling: SamplingConfig, stop: StopConfig) -> None:
    """Reads lines and streams answers until the input ends. CallError if no model is served at the start."""
    terminal = Console(highlight=False, soft_wrap=True)
    model = client.model()
    name, context = model.name.removeprefix("models/"), f"{model.max_context_tokens:,} tokens of context"
    terminal.print(f"{name} · {context}\n{HELP}", style="dim", markup=False)
    history: list[ChatMessage] = []
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is pasted need not be UTF-8
    while (line := _read_line(terminal)) is not None:
        match line.strip():
            case "":
                pass
            case "/quit":
                return
            case "/reset":
                history.clear()
                terminal.print("[dim]a new conversation")
            case command if command.startswith("/"):
                terminal.print(f"[dim]{HELP}")
            case _:
                history.append(ChatMessage(role="user", content=line))
                request = GenerateStreamRequest(chat=Chat(messages=history), sampling=sampling, stop=stop)
                text = _answer(client, request, terminal)
                if text:
                    history.append(ChatMessage(role="assistant", content=text))
                else:
                    history.pop()  # a template may insist on turns that alternate


def _read_line(terminal: Console) -> str | None:
    """The next line, None at the end of the input or on Ctrl-C."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        terminal.print()
        return None


def _answer(client: Client, request: GenerateStreamRequest, terminal: Console) -> str:
    """Streams one answer and returns its text, or what came of it before Ctrl-C or an error."""
    answer = Answer()
    try:
        answer.receive(client.stream(request), lambda text: terminal.out(text, end=""), terminal)
    except KeyboardInterrupt:
        terminal.print("\n[dim]stopped")
    except CallError as error:
        terminal.print(f"\n{error}", style="red", markup=False)
    if answer.finished is not None:
        terminal.print(f"\n[dim]{summary(answer.finished)}")
    return answer.text
