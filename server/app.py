"""Opens the ports, loads the model behind them, serves, and stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pagestream.server.admin import AdminListener, AdminService
from pagestream.server.assemble import assemble
from pagestream.server.canary import Canary
from pagestream.server.config import ServerConfig, wants_traces
from pagestream.server.door import Door
from pagestream.server.engine import Engine
from pagestream.server.http import start_http
from pagestream.server.interceptor import Sink
from pagestream.server.keys import KeyFile
from pagestream.server.listener import Listener, address_of
from pagestream.server.logs import log_call, set_up_logging
from pagestream.server.metrics import Metrics
from pagestream.server.objectives import Objectives
from pagestream.server.resident import release_code
from pagestream.server.served import ModelSlot, ServedModel
from pagestream.server.snapshot import ServerState
from pagestream.server.streams import Streams
from pagestream.server.tls import TlsFiles
from pagestream.server.watchdog import Watchdog

if TYPE_CHECKING:
    from pagestream.server.tracing import Tracer

log = logging.getLogger(__name__)
T = TypeVar("T")

STALL_SECONDS = 30.0  # longer than any step: then nothing has come of waiting work for too long
_LAG_INTERVAL = 0.5  # seconds between two looks at how late the event loop is


def serve(config: ServerConfig) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP; a second one ends it at once. Returns the exit code.

    Raises ModelError if the model cannot be loaded and OSError if a port is taken or a file of certificates or keys
    cannot be used.
    """
    set_up_logging(config.log_format)
    return asyncio.run(_serve(config))


async def _serve(config: ServerConfig) -> int:
    loop = asyncio.get_running_loop()
    stop, stop_now = _on_signals(loop)
    objectives = Objectives(config.slo_ttft_ms / 1000, config.slo_itl_ms / 1000, config.slo_e2e_s)
    metrics, slot, streams = Metrics(objectives=objectives), ModelSlot(), Streams(loop)
    tokenizing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
    tracer = _tracer(metrics) if wants_traces() else None
    sinks: list[Sink] = [log_call, *([tracer] if tracer else [])]
    tls, keys = _locks(config)
    listener = Listener(config.host, config.grpc_port, slot, streams, tokenizing, metrics, tls, Door(keys), sinks)
    http = start_http(config.http_port, config.host, metrics, tls, keys)
    operating = AdminService(metrics, streams, stop.set)
    admin = AdminListener(config.admin_socket, operating) if config.admin_socket else None
    lag = loop.create_task(_watch_loop_lag(metrics))
    try:
        await listener.start()
        _say_where(config, listener.port, http.port)
        _warn_if_open(config)
        if admin:
            await admin.start()

        def on_fault() -> None:
            asyncio.run_coroutine_threadsafe(_lose_readiness(listener, metrics), loop)

        loading = _in_background(lambda: assemble(config, metrics, streams.publish, on_fault))
        stopping = loop.create_task(stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            model = loading.result()
            await _become_ready(model, slot, listener, metrics)
            watching = loop.create_task(_watch_engine(model.engine, listener, metrics))
            canary = loop.create_task(Canary(model, streams, tokenizing, metrics, config.canary_interval).run())
            await stopping
            watching.cancel()
            canary.cancel()
            await _drain(model.engine, listener, streams, metrics, config.drain_seconds, stop_now)
    finally:
        lag.cancel()
        await listener.stop()
        if admin:
            await admin.stop()
        http.close()
        tokenizing.shutdown(wait=False, cancel_futures=True)
        if tracer:
            await asyncio.to_thread(tracer.close)
    log.info("stopped")
    return 0


def _on_signals(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Event, asyncio.Event]:
    """What the first signal sets, and what the second one does."""
    first, second = asyncio.Event(), asyncio.Event()
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup asks for that
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangs_up else [])):
        loop.add_signal_handler(number, lambda: second.set() if first.is_set() else first.set())
    return first, second


def _locks(config: ServerConfig) -> tuple[TlsFiles | None, KeyFile | None]:
    """Of both ports. Raises OSError if the file of keys cannot be used."""
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        tls = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    return tls, KeyFile(config.keys_file) if config.keys_file else None


def _say_where(config: ServerConfig, grpc_port: int, http_port: int) -> None:
    web = f"{'https' if config.tls_cert else 'http'}://{address_of(config.host, http_port)}"
    log.info("gRPC on %s; metrics on %s/metrics, live page on %s/", address_of(config.host, grpc_port), web, web)


def _tracer(metrics: Metrics) -> Tracer | None:
    try:
        from pagestream.server.tracing import Tracer  # noqa: PLC0415 - an extra, and only where it is wanted
    except ImportError as error:
        log.warning("no spans are sent: %s (pip install 'pagestream[otel]')", error)
        return None
    return Tracer(lambda: metrics.status().model)


def _warn_if_open(config: ServerConfig) -> None:
    missing = [] if config.tls_cert else ["no TLS (--tls-cert, --tls-key)"]
    missing += [] if config.keys_file or config.tls_client_ca else ["no tokens (--keys-file)"]
    if missing and not _is_loopback(config.host):
        log.warning("%s is open to its network with %s", config.host, " and ".join(missing))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _become_ready(model: ServedModel, slot: ModelSlot, listener: Listener, metrics: Metrics) -> None:
    gc.freeze()  # what is there stays: collections need not look through it
    gc.enable()
    release_code()
    slot.fill(model)
    await listener.set_serving(serving=True)
    metrics.state = ServerState.READY
    log.info("ready: models/%s on %s in %s", model.name, model.device, model.dtype)


async def _lose_readiness(listener: Listener, metrics: Metrics) -> None:
    metrics.state = ServerState.FAILED
    await listener.set_serving(serving=False)
    await listener.lose_liveness()  # the device is gone


async def _drain(
    engine: Engine, listener: Listener, streams: Streams, metrics: Metrics, grace: float, stop_now: asyncio.Event
) -> None:
    """Refuses newcomers, lets running answers finish within the grace, ends the rest as UNAVAILABLE."""
    log.info("draining for at most %g s", grace)
    metrics.state = ServerState.DRAINING
    await listener.set_serving(serving=False)
    engine.drain(retry_after_seconds=grace)
    waits = [asyncio.create_task(streams.all_closed()), asyncio.create_task(stop_now.wait())]
    await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.to_thread(engine.stop)


async def _watch_engine(engine: Engine, listener: Listener, metrics: Metrics) -> None:
    """Takes readiness away while the engine is stalled, and gives it back when it gets on."""
    watchdog = Watchdog(STALL_SECONDS)
    while True:
        await asyncio.sleep(STALL_SECONDS / 10)
        stalled = watchdog.is_stalled(time.monotonic(), metrics.snapshot, engine.inbox.num_live)
        before, after = ServerState.READY, ServerState.STALLED
        if not stalled:
            before, after = after, before
        if metrics.state is before:  # a failed engine stays so
            log.warning("the engine is %s", "stalled: not ready" if stalled else "getting on again: ready")
            metrics.state = after
            await listener.set_serving(serving=not stalled)


async def _watch_loop_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.observe_loop_lag(loop.time() - due)


def _in_background(work: Callable[[], T]) -> asyncio.Future[T]:
    """Runs work in a daemon thread, so that a server that is told to stop while it loads need not finish loading."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # one of the two is given

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever awaits the future
            outcome = partial(settle, None, error)
        else:
            outcome = partial(settle, result, None)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future
