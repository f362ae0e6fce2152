"""Calls that no client means: random bytes, damaged and absurd messages, odd metadata, garbage instead of HTTP/2.

Every answer must be OK or a status with a reason of the closed list, in time; the server must live on and leak nothing.
usage: python -m tests.support.fuzz_wire [--count N] [--first SEED]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from pagestream.server import errors
from pagestream.server.listener import SERVICES
from tests.support.fuzz_files import mutate, report_result

AT_ONCE = 64  # calls of one connection
CALLS_PER_CONNECTION = 20_000
SECONDS = 30.0  # for one call; the usual is 0.01
LOOK_EVERY = 50_000  # calls between two looks at the server's memory
LEAK = 1.02  # the second half of the calls may not take more than this times the most of the first
_REASONS = {c.reason for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.RequestError)}
_TEXTS = (
    "",
    "x",
    "hello world",
    "\x00",
    "é日本🎉",
    "tiny",
    "models/echo",
    "\u202e",
    "a" * 300,
    "<|end|>",
    "%s{{ 7*7 }}",
)
_FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
_INTS = (0, 1, 2, 7, 15, 16, 17, 255, 256, 257, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
_HEADERS = ("x-pagestream-tenant", "authorization", "traceparent", "tracestate", "grpc-tags-bin", "x")


def _methods() -> list[tuple[str, Any, bool]]:
    """Path, class of the request, whether it streams; of every service of ours."""
    services = [descriptor_pool.Default().FindServiceByName(name) for name in SERVICES]
    return [
        (f"/{service.full_name}/{method.name}", GetMessageClass(method.input_type), method.server_streaming)
        for service in services
        for method in service.methods
    ]


METHODS = _methods()


def absurd(kind: Descriptor, chance: random.Random, depth: int = 0) -> Message:
    """A message of this kind with few, half or most of its fields set, to what nobody would."""
    message = GetMessageClass(kind)()
    density = chance.choice((0.15, 0.5, 0.9))
    for field in kind.fields:
        if chance.random() > density or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(chance.randrange(3)):
                getattr(message, field.name)[_integer(chance, 32, signed=False)] = chance.choice(_FLOATS)
        elif field.is_repeated:
            for _ in range(chance.choice((0, 1, 2, 20))):
                if field.message_type is not None:
                    getattr(message, field.name).add().CopyFrom(absurd(field.message_type, chance, depth + 1))
                else:
                    getattr(message, field.name).append(_SCALARS[field.cpp_type](chance))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(absurd(field.message_type, chance, depth + 1))
        else:
            setattr(message, field.name, _SCALARS[field.cpp_type](chance))
    return message


_SCALARS: dict[int, Callable[[random.Random], Any]] = {
    FieldDescriptor.CPPTYPE_STRING: lambda chance: chance.choice(_TEXTS),
    FieldDescriptor.CPPTYPE_BOOL: lambda chance: chance.random() < 0.5,
    FieldDescriptor.CPPTYPE_FLOAT: lambda chance: chance.choice(_FLOATS),
    FieldDescriptor.CPPTYPE_DOUBLE: lambda chance: chance.choice(_FLOATS),
    FieldDescriptor.CPPTYPE_INT32: lambda chance: _integer(chance, 31, signed=True),
    FieldDescriptor.CPPTYPE_ENUM: lambda chance: _integer(chance, 31, signed=True),
    FieldDescriptor.CPPTYPE_INT64: lambda chance: _integer(chance, 63, signed=True),
    FieldDescriptor.CPPTYPE_UINT32: lambda chance: _integer(chance, 32, signed=False),
    FieldDescriptor.CPPTYPE_UINT64: lambda chance: _integer(chance, 64, signed=False),
}


def _integer(chance: random.Random, bits: int, *, signed: bool) -> int:
    value = chance.choice(_INTS) % 2**bits
    return -value if signed and chance.random() < 0.3 else value


def make_call(seed: int) -> tuple[str, bytes, bool, tuple[tuple[str, str | bytes], ...]]:
    """Path, what is sent, whether the answer streams, metadata."""
    chance = random.Random(seed)
    path, kind, streams = chance.choice(METHODS)
    match chance.randrange(4):
        case 0:
            data = chance.randbytes(chance.choice((0, 1, 10, 100, 5000)))
        case 1:
            data = absurd(kind.DESCRIPTOR, chance).SerializeToString()
        case _:
            data = mutate(absurd(kind.DESCRIPTOR, chance).SerializeToString(), chance)
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if chance.random() < 0.1:
        name = chance.choice(_HEADERS)
        noise = chance.randbytes(chance.choice((1, 50, 4000)))
        metadata = ((name, noise if name.endswith("-bin") else noise.hex()),)
    return path, data, streams, metadata


async def _call(channel: grpc.aio.Channel, seed: int) -> str:
    """The outcome: OK, or a reason. Anything else is a finding, which begins with `untyped`."""
    path, data, streams, metadata = make_call(seed)
    try:
        if streams:
            async for _ in channel.unary_stream(path)(data, timeout=SECONDS, metadata=metadata):
                pass
        else:
            await channel.unary_unary(path)(data, timeout=SECONDS, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        reason = _reason(error)
        return reason if reason in _REASONS else f"untyped {error.code().name} {reason}: {error.details()}, seed {seed}"
    return "OK"


def _reason(error: grpc.aio.AioRpcError) -> str:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""


async def storm(address: str, seeds: range) -> Counter[str]:
    """Makes one call for each seed, many at once, connections in turn; after each a stranger that speaks no HTTP/2."""
    outcomes: Counter[str] = Counter()
    numbers = iter(seeds)

    async def work(channel: grpc.aio.Channel, share: list[int]) -> None:
        for seed in share:
            outcomes[await _call(channel, seed)] += 1

    while part := list(islice(numbers, CALLS_PER_CONNECTION)):
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            await asyncio.gather(*(work(channel, part[lane::AT_ONCE]) for lane in range(AT_ONCE)))
        for seed in part[: max(1, len(part) // 500)]:
            _send_garbage(address, random.Random(seed))
    return outcomes


def _send_garbage(address: str, chance: random.Random) -> None:
    host, port = address.rsplit(":", 1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    noise = chance.randbytes(chance.choice((9, 500, 9000)))
    stranger = socket.create_connection((host, int(port)), timeout=SECONDS)
    with stranger, contextlib.suppress(OSError):  # it hung up already
        stranger.sendall((preface if chance.random() < 0.7 else b"") + noise)


def main() -> None:
    from tests.support.process import ServerProcess
    from tests.support.tiny_model import save_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first message")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args()
    os.environ["MKL_DISABLE_FAST_MM"] = "1"  # else MKL keeps 4.5 MB for each new shape of a product, and hides a leak
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "tiny")
        server = ServerProcess(model, "--threads", "1", "--max-context", "48", "--kv-memory", "2MiB")
        try:
            server.wait_until_ready()
            asyncio.run(storm(server.address, range(2000)))  # every thread and buffer there will be
            server.wait_until_idle()
            before = server.resources()
            started = time.monotonic()
            outcomes: Counter[str] = Counter()
            resident = []
            seeds = range(options.first, options.first + options.count)
            for start in seeds[::LOOK_EVERY]:
                outcomes += asyncio.run(storm(server.address, range(start, min(start + LOOK_EVERY, seeds.stop))))
                server.wait_until_idle()
                resident.append(server.resident_bytes())
            elapsed = time.monotonic() - started
            after = server.resources()
            leaked = server.metric("kv_leaked_blocks")
            tracebacks = sum("Traceback" in line for line in server.log)
            server.terminate()
            code = server.wait_for_exit(60)
        finally:
            server.stop()
    untyped = [outcome for outcome in outcomes if outcome.startswith("untyped")]
    result = {
        "messages": outcomes.total(),
        "first_seed": options.first,
        "seconds": round(elapsed, 1),
        "outcomes": {name: count for name, count in sorted(outcomes.items()) if name not in untyped},
        "untyped": untyped[:50],
        "tracebacks": tracebacks,
        "leaked_blocks": leaked,
        "files_threads": {"before": before, "after": after},
        f"resident_bytes_each_{LOOK_EVERY}": resident,
        "exit_code": code,
    }
    half = len(resident) // 2
    grows = half > 0 and max(resident[half:]) > LEAK * max(resident[:half])
    report_result("fuzz_wire", result, options.out)
    sys.exit(1 if untyped or tracebacks or leaked or grows or code else 0)


if __name__ == "__main__":
    main()
