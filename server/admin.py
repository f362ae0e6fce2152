"""AdminService on a Unix socket of its own: for whoever runs the server, never for its clients."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import duration_pb2

from pagestream.server import status
from pagestream.server.errors import InvalidFieldError
from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.streams import Streams
from pagestream.v1 import admin_pb2 as pb
from pagestream.v1.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class AdminService(AdminServiceServicer):
    """`drain` is called for what SIGTERM does."""

    def __init__(self, metrics: Metrics, streams: Streams, drain: Callable[[], None]) -> None:
        self._metrics = metrics
        self._streams = streams
        self._drain = drain

    async def Drain(  # noqa: N802 - the proto's name
        self, _request: pb.DrainRequest, _context: Context
    ) -> pb.DrainResponse:
        log.info("told to drain on the admin socket")
        self._drain()
        return pb.DrainResponse()

    async def GetState(  # noqa: N802 - the proto's name
        self, _request: pb.GetStateRequest, _context: Context
    ) -> pb.GetStateResponse:
        state, snapshot = self._metrics.status(), self._metrics.snapshot
        now = time.monotonic()
        jobs = sorted(self._streams.jobs, key=lambda job: job.received)
        return pb.GetStateResponse(
            state=state.state.value,
            model=state.model or "",
            free_blocks=snapshot.free_blocks,
            active_blocks=snapshot.active_blocks,
            cached_blocks=snapshot.cached_blocks,
            requests=[_live_request(job, now) for job in jobs],
        )

    async def SetLogLevel(  # noqa: N802 - the proto's name
        self, request: pb.SetLogLevelRequest, context: Context
    ) -> pb.SetLogLevelResponse:
        if request.level not in _LEVELS:
            await status.abort(context, InvalidFieldError("level", f"must be one of {', '.join(_LEVELS)}"))
        logging.getLogger().setLevel(request.level)
        log.warning("the log level is %s now", request.level)
        return pb.SetLogLevelResponse()


class AdminListener:
    """Opens the socket for the server's own user alone. Raises OSError if that cannot be done."""

    def __init__(self, path: Path, service: AdminService) -> None:
        _remove_if_dead(path)
        self._path = path
        self._server = grpc.aio.server()
        add_AdminServiceServicer_to_server(service, self._server)
        mask = os.umask(0o177)  # from its first moment on, not only after a chmod
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"the admin socket {path} cannot be opened") from error
        finally:
            os.umask(mask)

    async def start(self) -> None:
        await self._server.start()
        log.info("admin on unix:%s", self._path)

    async def stop(self) -> None:
        await self._server.stop(grace=1.0)
        self._path.unlink(missing_ok=True)


def _remove_if_dead(path: Path) -> None:
    """What a killed server left behind; a socket that somebody answers is not ours to take."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
        else:
            raise OSError(f"the admin socket {path} belongs to a server that runs")


def _live_request(job: Job, now: float) -> pb.LiveRequest:
    """The engine's thread writes while this reads: each number is one that was true just now."""
    request = job.request
    return pb.LiveRequest(
        request_id=request.request_id,
        tenant=request.tenant,
        age=duration_pb2.Duration(seconds=int(now - job.received)),
        prompt_tokens=request.num_prompt_tokens,
        computed_tokens=request.num_computed,
        output_tokens=request.num_output_tokens,
        preemptions=request.num_preemptions,
        unread_tokens=job.unread,
    )
