"""`pagestream estimate`: what a prompt would cost, without running it. A client, like `generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from pagestream.server.client import CallError, Client, Credentials, UnreachableError, seconds_of
from pagestream.server.options import Address, TlsCa, TlsCert, TlsKey, Token, read_prompt
from pagestream.v1.generation_pb2 import Chat, ChatMessage
from pagestream.v1.insight_pb2 import EstimateRequest, EstimateResponse

FAILED, UNREACHABLE = 1, 4  # exit codes; 0 is an answer


def estimate(
    text: Annotated[str, typer.Argument(help="The prompt; [bold]-[/] reads it from stdin.")],
    *,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="As a message, or as it is.")] = True,
    address: Address = "localhost:50051",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
) -> None:
    """Says what a prompt would cost on a server as it is now: tokens, time to first token, and what others would wait.

    Example: [bold]pagestream estimate --raw - < report.txt[/]
    """
    prompt = read_prompt(text)
    request = EstimateRequest(text=prompt)
    if chat:
        request = EstimateRequest(chat=Chat(messages=[ChatMessage(role="user", content=prompt)]))
    try:
        with Client(address, Credentials(tls_ca, tls_cert, tls_key, token)) as client:
            typer.echo("\n".join(sentences(client.estimate(request))))
    except (CallError, OSError) as error:
        typer.echo(f"pagestream: {error}", err=True)
        raise typer.Exit(UNREACHABLE if isinstance(error, UnreachableError) else FAILED) from error


def sentences(found: EstimateResponse) -> list[str]:
    """The forecast in words."""
    cached = f", {found.cached_tokens:,} of them cached" if found.cached_tokens else ""
    lines = [f"{found.prompt_tokens:,} prompt tokens{cached}"]
    if not found.HasField("time_to_first_token"):
        return [*lines, "no forecast yet: it is fitted to the prompts that the server reads"]
    first, queue, stall, gap = map(
        seconds_of, (found.time_to_first_token, found.queue, found.stall_for_others, found.gap_after)
    )
    lines.append(
        f"first token after {first:.3g} s, {queue:.3g} s of it behind others; then one every {gap * 1e3:.3g} ms"
    )
    lines.append(f"streams that run now would wait {stall:.3g} s for it in all")
    if found.extrapolated:
        lines.append(f"longer than any of the {found.samples} steps with prompts that this was fitted to: extrapolated")
    return lines
