"""The command line: `pagestream loadtest`. What a command needs is imported when it runs."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:
    from pagestream.loadtest.credentials import Credentials
    from pagestream.loadtest.measures import Objectives
    from pagestream.loadtest.plan import Plan
    from pagestream.loadtest.scrape import MetricsPage

REGRESSED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 4, 130  # exit codes; 0 is a clean end

app = typer.Typer(
    help="Measures a server as its clients see it, by the length of the prompt.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TargetUrl = Annotated[str, typer.Option(help="grpc://HOST:PORT, or http://HOST:PORT of any OpenAI-compatible server.")]
Metrics = Annotated[
    str | None, typer.Option(help="URL of the server's /metrics.", show_default="port 8080, or /metrics beside http://")
]
TlsCa = Annotated[
    str | None, typer.Option(metavar="PATH", help="PEM of the server's authority.", show_default="no TLS")
]
TlsCert = Annotated[str | None, typer.Option(metavar="PATH", help="PEM of the client's own certificate.")]
TlsKey = Annotated[str | None, typer.Option(metavar="PATH", help="PEM of its private key.")]
Token = Annotated[
    str | None,
    typer.Option(help="Of the server's key file; of a key with metrics to read those.", envvar="PAGESTREAM_TOKEN"),
]


@app.command(epilog="[dim]Exit codes: 0 ran to its end, 2 wrong usage, 4 no server answers, 130 Ctrl-C.")
def run(
    scenarios: Annotated[
        list[str],
        typer.Argument(metavar="SCENARIO...", help="Shapes of requests, run one after another."),
    ],
    *,
    target: TargetUrl = "grpc://localhost:50051",
    arrivals: Annotated[str, typer.Option(help="When requests are sent.")] = "closed",
    faults: Annotated[str, typer.Option(help="Fractions of cancel, deadline, slow or kill: kill=0.1.")] = "",
    slo: Annotated[str, typer.Option(help="Seconds of ttft, itl, tpot or e2e for goodput: ttft=1,itl=0.2.")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Sends for at most so long.")] = 60.0,
    requests: Annotated[int, typer.Option(min=1, help="Sends at most so many; conversations count as one.")] = 1000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that each request may take.")] = 300.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that send.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    metrics: Metrics = None,
    server_metrics: Annotated[bool, typer.Option(help="Read the server's own numbers too.")] = True,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="loadtest-DATE")] = None,
) -> None:
    """Sends requests and writes down when each token came, and percentiles by length.

    All of it goes to a folder, with the server's own view beside it.

    Scenarios: fixed:prompt=128,output=64 · bimodal:short=64,long=2048,share=0.2 · ladder:lengths=64/512/4096 ·
    shared-prefix:prefix=512,groups=4 · multi-turn:turns=4,user=64 · trace:file=FILE.

    Arrivals: closed:concurrency=8 · constant:rate=2 · poisson:rate=2 · gamma:rate=2,burstiness=0.5 ·
    ramp:start=1,end=10,seconds=60 · step:rates=1/2/4,seconds=20 · trace:file=FILE.

    Example: [bold]pagestream loadtest run bimodal --arrivals poisson:rate=2 --seconds 30 --slo ttft=1[/]
    """
    from pagestream.loadtest.credentials import Credentials  # noqa: PLC0415
    from pagestream.loadtest.measures import Objectives  # noqa: PLC0415
    from pagestream.loadtest.plan import Plan  # noqa: PLC0415
    from pagestream.loadtest.scrape import MetricsPage  # noqa: PLC0415
    from pagestream.loadtest.spec import SpecError, parse_settings  # noqa: PLC0415
    from pagestream.loadtest.target import metrics_url  # noqa: PLC0415

    plans = [Plan(target, each, arrivals, faults, seed, seconds, requests, timeout, workers) for each in scenarios]
    try:
        objectives = parse_settings(slo, Objectives, what="slo")
        for plan in plans:
            plan.check()
        credentials = Credentials(tls_ca, tls_cert, tls_key, token)
        page = MetricsPage(metrics or metrics_url(target, credentials), credentials) if server_metrics else None
    except (SpecError, OSError) as error:
        _fail(error, USAGE)
    folder = out or Path(f"loadtest-{dt.datetime.now():%Y%m%d-%H%M%S}")
    for number, plan in enumerate(plans, start=1):
        name = f"{number}-{plan.shape.partition(':')[0]}"
        _run_one(plan, objectives, page, folder / name if len(plans) > 1 else folder, credentials)


def _run_one(
    plan: Plan, objectives: Objectives, page: MetricsPage | None, folder: Path, credentials: Credentials
) -> None:
    from pagestream.loadtest.report import live_view, print_summary  # noqa: PLC0415
    from pagestream.loadtest.run import Progress  # noqa: PLC0415
    from pagestream.loadtest.run import run as run_plan  # noqa: PLC0415
    from pagestream.loadtest.spec import SpecError  # noqa: PLC0415
    from pagestream.loadtest.target import TargetError  # noqa: PLC0415

    console = Console()
    interrupted = False

    async def work(live: Live) -> dict[str, Any]:
        task = asyncio.current_task()

        def stop() -> None:
            nonlocal interrupted
            interrupted = True
            if task is not None:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)

        def show(progress: Progress) -> None:
            live.update(live_view(progress))

        return await run_plan(plan, objectives, page, folder, show, credentials)

    console.print(f"{plan.shape} · {plan.arrivals} → {plan.target}")
    try:
        with _extra(), Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
            summary = asyncio.run(work(live))
    except SpecError as error:
        _fail(error, USAGE)
    except TargetError as error:
        _fail(error, UNREACHABLE)
    except asyncio.CancelledError:
        raise typer.Exit(INTERRUPTED) from None
    print_summary(console, summary)
    console.print(f"written to {folder}", style="dim")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if summary["server_lost"]:
        _fail(f"the server was gone at the end: {summary['server_lost']}", UNREACHABLE)


@app.command(epilog="[dim]Exit codes: 0 no worse, 1 worse beyond the threshold, 2 nothing to compare.")
def compare(
    before: Annotated[Path, typer.Argument(help="Folder of a run.")],
    after: Annotated[Path, typer.Argument(help="Folder of another, as of the same scenario after a change.")],
    *,
    threshold: Annotated[float, typer.Option(min=0, help="Slower by more than this share is worse.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Write the table as JSON too.")] = None,
) -> None:
    """Ratios of latencies by length, after over before, with 95 % bootstrap intervals.

    Runs of the same requests (same scenario and seed) are compared request by request. Worse is a ratio whose whole
    interval lies beyond the threshold.
    """
    from pagestream.loadtest.compare import CompareError, compare_runs, print_comparison  # noqa: PLC0415

    try:
        comparison = compare_runs(before, after, threshold)
    except CompareError as error:
        _fail(error, USAGE)
    print_comparison(Console(), comparison)
    if out is not None:
        out.write_text(comparison.to_json() + "\n")
    if comparison.regressions:
        raise typer.Exit(REGRESSED)


@app.command(epilog="[dim]Exit codes: 0 drawn, 2 nothing to draw.")
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are drawn together.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="the first run's")] = None,
) -> None:
    """Draws nine figures of a run, each as PNG and SVG."""
    with _extra():
        from pagestream.loadtest.plots import PlotError, draw_all  # noqa: PLC0415

    try:
        drawn = draw_all(runs, out or runs[0] / "plots")
    except PlotError as error:
        _fail(error, USAGE)
    for path in drawn:
        typer.echo(path)


@app.command(epilog="[dim]Exit codes: 0 drawn, 1 it contradicts the other card, 2 wrong usage, 4 no server answers.")
def degradation(
    *,
    target: Annotated[str, typer.Option(help="grpc://HOST:PORT of a pagestream server.")] = "grpc://localhost:50051",
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two: up to 1,024 tokens, few trials.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="latency, interference, dilution, quality or control; other parts stay as they are in --out.",
            show_default="all",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=2, help="Of each length and task: what answers take.", show_default="40, quick: 4")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="grpc://HOST:PORT of another server of the model, as with --dtype fp32: the control."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="JSON of another card, which this one should repeat.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts.")] = 0,
    metrics: Metrics = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, the JSON and a figure.")] = Path(),
) -> None:
    """Measures what longer prompts cost a model, as served: seconds, attention, answers.

    Needs a server without other work; half an hour on two cores for 135 M parameters, most of it for the answers.

    Example: [bold]pagestream loadtest degradation --out cards[/]
    """
    with _extra():
        from pagestream.loadtest.degradation.command import DegradationError, draw_card  # noqa: PLC0415
    from pagestream.loadtest.credentials import Credentials  # noqa: PLC0415
    from pagestream.loadtest.target import TargetError, metrics_url  # noqa: PLC0415

    credentials = Credentials(tls_ca, tls_cert, tls_key, token)
    url = metrics or metrics_url(target, credentials)
    try:
        agrees = draw_card(
            target, url, out, only, against, seed, credentials, quick=quick, reference=reference, trials=trials
        )
    except DegradationError as error:
        _fail(error, USAGE)
    except TargetError as error:
        _fail(error, UNREACHABLE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not agrees:
        raise typer.Exit(REGRESSED)


@contextmanager
def _extra() -> Iterator[None]:
    """What may import a library that pagestream does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"this needs {error.name}: pip install 'pagestream[loadtest]'", USAGE)


def _fail(problem: Exception | str, code: int) -> NoReturn:
    typer.echo(f"pagestream loadtest: {problem}", err=True)
    raise typer.Exit(code)
