"""All gRPC services on a free port, with a model that repeats its prompt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pagestream.server.listener import Listener
from pagestream.server.metrics import Metrics
from pagestream.server.served import ModelSlot, ServedModel
from pagestream.server.streams import Streams
from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client
from tests.support.fakes import ByteTokenizer, Rig
from tests.support.waiting import WAIT

T = TypeVar("T")
MAX_CONTEXT, KV_CAPACITY = 2048, 1024  # tokens; the latter is the default of Rig


def stop(max_tokens: int, **fields: Any) -> pb.StopConfig:
    return pb.StopConfig(max_tokens=max_tokens, **fields)


def served(rig: Rig, tokenizer: ByteTokenizer) -> ServedModel:
    return ServedModel(
        name="echo",
        tokenizer=tokenizer,
        engine=rig.engine,
        architecture="llama",
        parameters=123,
        vocab_size=tokenizer.vocab_size,
        max_context=MAX_CONTEXT,
        kv_capacity_tokens=rig.pool.capacity,
        page_size=rig.pool.block_size,
        device="cpu",
        dtype="fp32",
        kv_dtype="bf16",
    )


class Service:
    """All services on a free port, in an event loop of their own thread. `listening` is for the Listener."""

    def __init__(
        self,
        metrics: Metrics,
        tokenizer: ByteTokenizer,
        listening: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.metrics = metrics
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.tokenizing = ThreadPoolExecutor(max_workers=2)
        self.streams = Streams(self.loop)
        self.rig = Rig(metrics, publish=self.streams.publish, **settings)
        slot = ModelSlot()
        slot.fill(served(self.rig, tokenizer))
        self.listener = self.run(self._listen(slot, listening or {}))
        self.address = f"127.0.0.1:{self.listener.port}"
        self.client = Client(self.address)

    async def _listen(self, slot: ModelSlot, listening: dict[str, Any]) -> Listener:
        listener = Listener("127.0.0.1", 0, slot, self.streams, self.tokenizing, self.metrics, **listening)
        await listener.start()
        return listener

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT)

    def is_idle(self) -> bool:
        """No stream is open and all blocks are free, as the metrics tell it."""
        values = self.metrics.read().values
        return values["kv_blocks"]["active",] == 0 and not any(values["grpc_active_streams"].values())

    def close(self) -> None:
        self.client.close()
        self.rig.close()
        self.run(self.listener.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)
        self.loop.close()
        self.tokenizing.shutdown()
