"""The gRPC port: all services, health, reflection, and options that third-party clients survive."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from concurrent.futures import Executor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from pagestream.server.door import Door
from pagestream.server.info_services import ModelService, TokenizerService
from pagestream.server.insight_service import InsightService
from pagestream.server.interceptor import Interceptor, Sink
from pagestream.server.metrics import Metrics
from pagestream.server.served import ModelSlot
from pagestream.server.service import GenerationService
from pagestream.server.streams import Streams
from pagestream.server.tls import TlsFiles, server_credentials
from pagestream.v1 import generation_pb2, insight_pb2, model_pb2, tokenizer_pb2
from pagestream.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from pagestream.v1.insight_pb2_grpc import add_InsightServiceServicer_to_server
from pagestream.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from pagestream.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server

LIVENESS = "liveness"  # a health name: SERVING until only a new process can help
SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, insight_pb2, tokenizer_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
MAX_CALLS_PER_CONNECTION = 1024  # more wait at the client

# Clients and gateways ping idle and silent connections far more often than gRPC's default of once in five minutes
# allows, and would be sent away with "too_many_pings" during a long prefill.
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),  # between the two, gRPC refuses at random
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port that is taken must be an error, not a share of the traffic
)


class Listener:
    """Opens before the model is loaded: until then every call but health and reflection is UNAVAILABLE."""

    def __init__(
        self,
        host: str,
        port: int,
        slot: ModelSlot,
        streams: Streams,
        tokenizing: Executor,
        metrics: Metrics,
        tls: TlsFiles | None = None,
        door: Door | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Raises OSError if the port cannot be had or the TLS files cannot be used; port 0 takes a free one."""
        credentials = server_credentials(tls) if tls else None
        _check_port(host, port)
        self._server = grpc.aio.server(interceptors=[Interceptor(metrics, door or Door(), sinks)], options=OPTIONS)
        self._health = health.HealthServicer()
        generation = GenerationService(slot, streams, tokenizing, metrics)
        add_GenerationServiceServicer_to_server(generation, self._server)
        insight = InsightService(slot, streams, tokenizing, metrics)
        add_InsightServiceServicer_to_server(insight, self._server)
        add_TokenizerServiceServicer_to_server(TokenizerService(slot, tokenizing), self._server)
        add_ModelServiceServicer_to_server(ModelService(slot), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if importlib.util.find_spec("smg_grpc_proto") is not None:  # the extra `gateway`
            from pagestream.server.vllm_service import VllmEngineService  # noqa: PLC0415

            VllmEngineService(generation, slot, streams, tokenizing, metrics).add_to(self._server)
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            address = address_of(host, port)
            self.port: int = (
                self._server.add_secure_port(address, credentials)
                if credentials
                else self._server.add_insecure_port(address)
            )
        except RuntimeError as error:
            raise OSError(f"the gRPC port {address_of(host, port)} cannot be opened") from error

    async def start(self) -> None:
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(serving=False)
        await self._server.start()

    async def set_serving(self, *, serving: bool) -> None:
        """Readiness, under the empty name and every service's own."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, state)

    async def lose_liveness(self) -> None:
        """Asks whoever started the process to start another."""
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Lets answers that are being written go out, then closes every connection."""
        await self._server.stop(grace=1.0)


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_port(host: str, port: int) -> None:
    """Raises OSError if nobody can listen there, as where another server does: gRPC prints lines of its own before it
    says so, and not why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has ended is in nobody's way
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"the gRPC port {address_of(host, port)} cannot be opened ({error.strerror}): "
                "choose another --grpc-port or --host"
            ) from error
