"""The command line: `pagestream`, or `python -m pagestream.server`."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pagestream.model.default_model import fetch_default_model
from pagestream.model.errors import ModelError
from pagestream.server import estimate, health, top
from pagestream.server.chat import run_chat
from pagestream.server.client import CallError, Client, Credentials, UnreachableError
from pagestream.server.config import (
    Device,
    Dtype,
    KvDtype,
    LogFormat,
    ServerConfig,
    default_cache_dir,
    let_idle_threads_sleep,
    load_config,
)
from pagestream.server.operate import admin, doctor, token_command
from pagestream.server.options import Address, TlsCa, TlsCert, TlsKey, Token, read_prompt
from pagestream.server.printing import print_answer, print_answers, print_events
from pagestream.v1.generation_pb2 import GenerateStreamRequest, SamplingConfig, StopConfig

FAILED, USAGE, NO_MODEL, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 130  # exit codes; 0 is a clean end

app = typer.Typer(
    help="Streams tokens from Llama-family models over gRPC and shows what long prompts cost.\n\n"
    "Start with [bold]pagestream serve[/]; then, in another terminal, [bold]pagestream chat[/].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a server's log wants Python's own
)

_CLIENT_EPILOG = (
    "[dim]Exit codes: 0 answered, 1 the server refused or failed, 2 wrong usage, 4 no server answers, 130 Ctrl-C."
)
Temperature = Annotated[float | None, typer.Option(help="0 always takes the most likely token.", show_default="0")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.", show_default="drawn")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="what fits")]


def _setting(help: str, default: object) -> Any:  # noqa: A002 - typer's own word
    return typer.Option(help=help, show_default=str(default))


@app.command(epilog="[dim]Exit codes: 0 stopped, 1 cannot listen, 2 bad setting, 3 the model cannot be loaded.")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Hugging Face folder, .gguf file or [bold]default[/].", show_default="default"),
    ] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="TOML file of these settings; flags win.")] = None,
    device: Annotated[Device | None, _setting("Where to compute.", ServerConfig.device)] = None,
    dtype: Annotated[Dtype | None, _setting("Weights and arithmetic; fp32 is exact.", ServerConfig.dtype)] = None,
    kv_dtype: Annotated[KvDtype | None, _setting("Cached keys and values.", ServerConfig.kv_dtype)] = None,
    host: Annotated[str | None, _setting("0.0.0.0 for every network.", ServerConfig.host)] = None,
    grpc_port: Annotated[int | None, _setting("0 takes a free one.", ServerConfig.grpc_port)] = None,
    http_port: Annotated[int | None, _setting("The live page, /metrics, /healthz.", ServerConfig.http_port)] = None,
    threads: Annotated[int | None, _setting("CPU threads.", "all cores")] = None,
    kv_memory: Annotated[str | None, _setting("For keys and values, such as 2GiB.", "from free memory")] = None,
    max_context: Annotated[int | None, _setting("Tokens of prompt and answer.", "the model's")] = None,
    page_size: Annotated[int | None, _setting("Tokens: 16, 32, 64 or 128.", ServerConfig.page_size)] = None,
    prefix_cache: Annotated[
        bool | None, _setting("Keep what was computed for prompts that begin alike.", ServerConfig.prefix_cache)
    ] = None,
    speculation: Annotated[
        bool | None, _setting("Guess from the prompt what comes next; same answers.", "with int4 and int8")
    ] = None,
    deterministic: Annotated[
        bool | None, _setting("Same bits read or generated; slower prompts; int8, int4.", ServerConfig.deterministic)
    ] = None,
    token_budget: Annotated[int | None, _setting("Tokens of one step.", ServerConfig.token_budget)] = None,
    target_gap_ms: Annotated[float | None, _setting("Gap beside long prompts.", ServerConfig.target_gap_ms)] = None,
    max_running: Annotated[int | None, _setting("Requests at once.", "64, or the token budget")] = None,
    max_queue_requests: Annotated[int | None, _setting("More are refused.", ServerConfig.max_queue_requests)] = None,
    max_queue_tokens: Annotated[int | None, _setting("Of prompts that wait.", ServerConfig.max_queue_tokens)] = None,
    slow_reader_seconds: Annotated[
        float | None, _setting("An answer nobody reads ends.", ServerConfig.slow_reader_seconds)
    ] = None,
    drain_seconds: Annotated[float | None, _setting("Grace at SIGTERM.", ServerConfig.drain_seconds)] = None,
    canary_interval: Annotated[
        float | None, _setting("Seconds between checks of known answers; 0: none.", ServerConfig.canary_interval)
    ] = None,
    slo_ttft_ms: Annotated[float | None, _setting("Objective: first token.", ServerConfig.slo_ttft_ms)] = None,
    slo_itl_ms: Annotated[float | None, _setting("Objective: p99 of the gaps.", ServerConfig.slo_itl_ms)] = None,
    slo_e2e_s: Annotated[float | None, _setting("Objective: whole answer.", ServerConfig.slo_e2e_s)] = None,
    attention_every: Annotated[
        int | None, _setting("Steps between looks at attention; 0: none.", ServerConfig.attention_every)
    ] = None,
    cache_dir: Annotated[Path | None, _setting("Where models are kept.", "~/.cache/pagestream")] = None,
    tls_cert: Annotated[Path | None, _setting("PEM with the chain; read again when it changes.", "no TLS")] = None,
    tls_key: Annotated[Path | None, _setting("PEM of its private key.", "no TLS")] = None,
    tls_client_ca: Annotated[Path | None, _setting("Authority of certificates that clients must show.", "none")] = None,
    keys_file: Annotated[Path | None, _setting("TOML of `pagestream token`: who is let in.", "anybody")] = None,
    admin_socket: Annotated[Path | None, _setting("Unix socket of the AdminService.", "none")] = None,
    log_format: Annotated[LogFormat | None, _setting("Lines for people or for machines.", "text")] = None,
) -> None:
    """Serves a model over gRPC until Ctrl-C or SIGTERM.

    Examples:
    [bold]pagestream serve[/]

    [bold]pagestream serve ~/models/Qwen3-0.6B --dtype fp32 --kv-memory 2GiB[/]

    A file for --config holds the same names: [bold]kv_memory = "2GiB"[/].
    """
    flags = {name: value for name, value in locals().items() if value is not None and name != "config"}
    try:
        settings = load_config(config, flags)
    except ValueError as error:
        _fail(error, USAGE)
    # Until the server handles it: the first process of a container does not get signals that it ignores.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    let_idle_threads_sleep()
    gc.disable()  # until the model is loaded: looking for garbage among what stays takes a tenth of the start
    from pagestream.server.app import serve as run_server  # noqa: PLC0415 - torch: seconds that --help need not wait

    try:
        code = run_server(settings)
    except ModelError as error:
        _fail(error, NO_MODEL)
    except OSError as error:
        _fail(error, FAILED)
    raise typer.Exit(code)


@app.command(epilog=_CLIENT_EPILOG)
def generate(
    text: Annotated[str, typer.Argument(help="The prompt; [bold]-[/] reads it from stdin.")],
    *,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Answer it as a message, or continue it as it is.")] = True,
    address: Address = "localhost:50051",
    max_tokens: MaxTokens = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    temperature: Temperature = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most likely.", show_default="all")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest that sum to p.", show_default="1")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only those p times the best.", show_default="0")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer repeats.", show_default="1")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Once for each token.", show_default="0")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="For every use.", show_default="0")] = None,
    seed: Seed = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Answers, of seeds in a row.", show_default="1")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the events, one JSON object a line.")] = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
) -> None:
    """Streams one answer to stdout; Ctrl-C cancels it on the server too.

    A summary goes to stderr. Several answers (-n) come as each is complete.

    Examples:
    [bold]pagestream generate "Why is the sky blue?" --max-tokens 80[/]

    [bold]git diff | pagestream generate - --raw --temperature 0.7 --stop END[/]
    """
    sampling, stop_config = _generation(
        max_tokens,
        stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    request = GenerateStreamRequest(sampling=sampling, stop=stop_config, n=n or 0)
    prompt = read_prompt(text)
    if chat:
        request.chat.messages.add(role="user", content=prompt)
    else:
        request.text = prompt
    with _connect(address, Credentials(tls_ca, tls_cert, tls_key, token)) as client:
        if json:
            print_events(client, request)
        elif request.n > 1:
            print_answers(client, request)
        else:
            print_answer(client, request)


@app.command(epilog=_CLIENT_EPILOG)
def chat(
    address: Address = "localhost:50051",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
) -> None:
    """Chats in the terminal; Ctrl-C stops an answer, Ctrl-D leaves.

    Examples:
    [bold]pagestream chat[/]

    [bold]pagestream chat --address gpu-box:50051 --temperature 0.7[/]
    """
    sampling, stop = _generation(max_tokens, None, temperature=temperature, seed=seed)
    with _connect(address, Credentials(tls_ca, tls_cert, tls_key, token)) as client:
        run_chat(client, sampling, stop)


@app.command(epilog="[dim]Exit codes: 0 it is there, 3 it cannot be had.")
def pull(cache_dir: Annotated[Path | None, _setting("Where models are kept.", "~/.cache/pagestream")] = None) -> None:
    """Fetches the default model into the cache, where [bold]pagestream serve[/] finds it, offline too.

    Example: [bold]pagestream pull[/]
    """
    try:
        path = fetch_default_model(cache_dir or default_cache_dir(), lambda stage: typer.echo(stage, err=True))
    except ModelError as error:
        _fail(error, NO_MODEL)
    typer.echo(path)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def loadtest(arguments: typer.Context) -> None:
    """Measures a server as its clients see it, and what long prompts cost: [bold]pagestream loadtest --help[/]."""
    from pagestream.loadtest.cli import app as loadtest_app  # noqa: PLC0415 - no server needs it

    loadtest_app(arguments.args, prog_name="pagestream loadtest")


app.command(epilog="[dim]Exit codes: 0 serving, 1 not serving, 2 wrong usage, 4 no server answers.")(health.health)
app.command("token", epilog="[dim]Exit codes: 0 made, 2 wrong usage.")(token_command)
app.command(epilog=_CLIENT_EPILOG)(admin)
app.command(epilog=_CLIENT_EPILOG)(estimate.estimate)
app.command(epilog="[dim]Exit codes: 0 left with Ctrl-C, 2 wrong usage, 4 no server answers.")(top.top)
app.command(epilog="[dim]Exit codes: 0 all is well, 1 something is missing, 2 bad setting.")(doctor)


def _generation(max_tokens: int | None, stop: list[str] | None, **sampling: Any) -> tuple[SamplingConfig, StopConfig]:
    """Settings as messages; None stays unset. The server knows the ranges, the messages only their integer types."""
    try:
        return SamplingConfig(**sampling), StopConfig(max_tokens=max_tokens, stop_strings=stop)
    except ValueError as error:
        _fail(error, USAGE)


@contextmanager
def _connect(address: str, credentials: Credentials) -> Iterator[Client]:
    """A client whose errors are one sentence and an exit code."""
    try:
        with Client(address, credentials) as client:
            yield client
    except UnreachableError as error:
        _fail(error, UNREACHABLE)
    except (CallError, OSError) as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _fail(error: Exception, code: int) -> NoReturn:
    typer.echo(f"pagestream: {error}", err=True)
    raise typer.Exit(code) from error


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"pagestream {metadata.version('pagestream')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    app(prog_name="pagestream")


if __name__ == "__main__":
    main()
