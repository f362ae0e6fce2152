"""`vllm.grpc.engine.VllmEngine`, the public contract of existing gateways and routers, over our own services.

Token ids out and no text: whoever calls this detokenises. The messages are those of the published package
`smg-grpc-proto` (the extra `gateway`); a second copy would clash in protobuf's registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import time
import zipfile
from collections import defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineServicer, add_VllmEngineServicer_to_server

from pagestream.model.step import SampledToken
from pagestream.model.tokenizer_export import tokenizer_files
from pagestream.server import status, vllm_messages
from pagestream.server.cache_watch import Watch
from pagestream.server.engine import Engine
from pagestream.server.errors import LoadingError, RequestError, UnsupportedError
from pagestream.server.events import Delta, Finished
from pagestream.server.metrics import Metrics
from pagestream.server.served import ModelSlot, ServedModel
from pagestream.server.service import GenerationService, tenant_of
from pagestream.server.snapshot import ServerState
from pagestream.server.streams import Streams
from pagestream.v1 import generation_pb2 as pb

_TOKENIZER_CHUNK = 1 << 20  # bytes of a message
_EVENTS_SECONDS, _HEARTBEAT_SECONDS = 0.1, 1.0
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same files give the same archive

Context = grpc.aio.ServicerContext[Any, Any]


class VllmEngineService(VllmEngineServicer):  # type: ignore[misc]  # the package has no types
    """Generation goes through GenerationService, so limits, refusals, fairness and metrics are the same."""

    def __init__(
        self, generation: GenerationService, slot: ModelSlot, streams: Streams, tokenizing: Executor, metrics: Metrics
    ) -> None:
        self._generation = generation
        self._slot = slot
        self._streams = streams
        self._tokenizing = tokenizing
        self._metrics = metrics
        self._started = time.monotonic()

    def add_to(self, server: grpc.aio.Server) -> None:
        add_VllmEngineServicer_to_server(self, server)

    async def Generate(  # noqa: N802 - the proto's name
        self, request: vllm.GenerateRequest, context: Context
    ) -> AsyncIterator[vllm.GenerateResponse]:
        try:
            async for response in self._answer(request, context):
                yield response
        except RequestError as error:
            await status.abort(context, error)

    async def _answer(self, request: vllm.GenerateRequest, context: Context) -> AsyncIterator[vllm.GenerateResponse]:
        answers: defaultdict[int, list[SampledToken]] = defaultdict(list)
        prompt_tokens = 0
        async for event in self._generation.events(vllm_messages.generation(request), context):
            match event:
                case pb.Accepted():
                    prompt_tokens = event.prompt_tokens
                case Delta():
                    tokens = answers[event.index]
                    tokens += event.tokens
                    if request.stream and event.tokens:
                        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)}
                        yield vllm_messages.chunk(event.tokens, counts, event.index)
                case Finished():
                    tokens = answers[event.index]
                    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)}
                    counts["cached_tokens"] = event.cached_tokens
                    yield vllm_messages.complete(tokens, counts, event)

    async def Abort(  # noqa: N802 - the proto's name
        self,
        request: vllm.AbortRequest,
        context: Context,
    ) -> vllm.AbortResponse:
        """Ids that are not live, or not the caller's tenant's, are passed over: an answer may have ended meanwhile."""
        for request_id in request.request_ids:
            self._streams.abort(request_id, tenant_of(context))
        return vllm.AbortResponse()

    async def HealthCheck(  # noqa: N802 - the proto's name
        self,
        request: vllm.HealthCheckRequest,
        context: Context,
    ) -> vllm.HealthCheckResponse:
        state = self._metrics.status().state
        return vllm.HealthCheckResponse(healthy=state is ServerState.READY, message=state.value)

    async def GetModelInfo(  # noqa: N802 - the proto's name
        self,
        request: vllm.GetModelInfoRequest,
        context: Context,
    ) -> vllm.GetModelInfoResponse:
        model = await self._model(context)
        tokenizer = model.tokenizer
        return vllm.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            is_generation=True,
            max_context_length=model.max_context,
            max_req_input_len=min(model.max_context, model.kv_capacity_tokens) - 1,
            vocab_size=model.vocab_size,
            model_type=model.architecture,
            architectures=[f"{model.architecture.capitalize()}ForCausalLM"],
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
            pad_token_id=-1,
        )

    async def GetServerInfo(  # noqa: N802 - the proto's name
        self,
        request: vllm.GetServerInfoRequest,
        context: Context,
    ) -> vllm.GetServerInfoResponse:
        model = await self._model(context)
        now = self._metrics.status()
        return vllm.GetServerInfoResponse(
            active_requests=now.running_requests + now.waiting_requests,
            uptime_seconds=time.monotonic() - self._started,
            server_type="vllm-grpc",  # the contract's own name: gateways compare it
            data_parallel_size=1,
            kv_cache_dtype=model.kv_dtype,
            model_dtype=model.dtype,
            block_size=model.page_size,
        )

    async def GetLoads(  # noqa: N802 - the proto's name
        self,
        request: vllm.GetLoadsRequest,
        context: Context,
    ) -> vllm.GetLoadsResponse:
        model = await self._model(context)
        snapshot = self._metrics.snapshot
        running, waiting = len(snapshot.running_contexts), len(snapshot.waiting_contexts)
        load = vllm.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=snapshot.active_blocks * model.page_size,
            max_total_num_tokens=model.kv_capacity_tokens,
            token_usage=snapshot.kv_cache_usage_ratio,
            num_waiting_uncached_tokens=snapshot.waiting_prompt_tokens,
        )
        return vllm.GetLoadsResponse(timestamp=datetime.now(UTC).isoformat(), dp_rank_count=1, loads=[load])

    async def GetTokenizer(  # noqa: N802 - the proto's name
        self,
        request: common.GetTokenizerRequest,
        context: Context,
    ) -> AsyncIterator[common.GetTokenizerChunk]:
        """A zip archive of tokenizer.json and tokenizer_config.json, whatever the model's own files are."""
        model = await self._model(context)
        loop = asyncio.get_running_loop()
        archive = await loop.run_in_executor(self._tokenizing, lambda: _archive(tokenizer_files(model.tokenizer)))
        for start in range(0, len(archive), _TOKENIZER_CHUNK):
            is_last = start + _TOKENIZER_CHUNK >= len(archive)
            digest = hashlib.sha256(archive).hexdigest() if is_last else ""
            yield common.GetTokenizerChunk(data=archive[start : start + _TOKENIZER_CHUNK], sha256=digest)

    async def FlushCache(  # noqa: N802 - the proto's name
        self,
        request: common.FlushCacheRequest,
        context: Context,
    ) -> common.FlushCacheResponse:
        """Forgets what nobody holds, at once and whatever runs: it disturbs nobody, so there is nothing to wait for."""
        model = await self._model(context)
        try:
            blocks = await asyncio.wrap_future(model.engine.inbox.ask(model.engine.cache.flush))
        except RequestError as error:
            await status.abort(context, error)
        return common.FlushCacheResponse(success=True, message=f"{blocks} blocks of {model.page_size} tokens are free")

    async def SubscribeKvEvents(  # noqa: N802 - the proto's name
        self,
        request: common.SubscribeKvEventsRequest,
        context: Context,
    ) -> AsyncIterator[common.KvEventBatch]:
        """What the caller's own tenant finds in the prefix cache, and the load. Whatever number it asks to go on from,
        it begins anew with what is there."""
        model = await self._model(context)
        engine, tenant = model.engine, tenant_of(context)
        watch = await asyncio.wrap_future(engine.inbox.ask(lambda: engine.cache.open(tenant)))
        context.add_done_callback(lambda _: _unsubscribe(engine, watch))  # type: ignore[arg-type]  # as in service.py
        number, beat = 0, 0.0
        while self._metrics.status().state is ServerState.READY:  # else the caller asks again, and is told why
            changes = engine.cache.read(watch)
            events = vllm_messages.kv_events(changes, model.page_size)
            now = time.monotonic()
            if events or now >= beat:
                number, beat = number + bool(events), now + _HEARTBEAT_SECONDS
                load = vllm_messages.engine_load(self._metrics.snapshot, load_only=not events)
                yield common.KvEventBatch(sequence_number=number, timestamp=time.time(), events=events, load=load)
            await asyncio.sleep(_EVENTS_SECONDS)

    async def _refuse(self, request: Message, context: Context) -> NoReturn:
        await status.abort(context, UnsupportedError("this server generates; it neither embeds nor profiles"))

    Embed = StartProfile = StopProfile = _refuse

    async def _model(self, context: Context) -> ServedModel:
        try:
            return self._slot.get()
        except LoadingError as error:
            await status.abort(context, error)


def _unsubscribe(engine: Engine, watch: Watch) -> None:
    with contextlib.suppress(RequestError):  # an engine that is gone has forgotten it
        engine.inbox.ask(lambda: engine.cache.close(watch))


def _archive(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), content, zipfile.ZIP_DEFLATED)
    return memory.getvalue()
