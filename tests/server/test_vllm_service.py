"""The contract of existing gateways, spoken with the published stubs against a model that repeats its prompt."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from pagestream.server.block_pool import BlockPool
from pagestream.server.cache_watch import MAX_UNREAD, CacheWatch, Changes
from pagestream.server.prefix_tree import FullPage
from pagestream.server.snapshot import ServerState
from pagestream.server.vllm_messages import generation
from pagestream.v1 import generation_pb2 as pb
from tests.support.client import refusal_of
from tests.support.fakes import END
from tests.support.service import Service
from tests.support.waiting import WAIT, wait_until


@pytest.fixture
def stub(service: Service) -> Iterator[VllmEngineStub]:
    service.metrics.state = ServerState.READY
    with grpc.insecure_channel(service.address) as channel:
        yield VllmEngineStub(channel)


def request(text: str, *, stream: bool = True, request_id: str = "", **sampling: object) -> vllm.GenerateRequest:
    ids = vllm.TokenizedInput(original_text="ignored", input_ids=text.encode())
    params = vllm.SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **sampling})
    return vllm.GenerateRequest(request_id=request_id, tokenized=ids, sampling_params=params, stream=stream)


def test_a_stream_is_chunks_and_a_whole(stub: VllmEngineStub) -> None:
    *chunks, last = stub.Generate(request("abc"), timeout=WAIT)
    assert bytes(token for chunk in chunks for token in chunk.chunk.token_ids) == b"abcabc"
    assert [chunk.chunk.completion_tokens for chunk in chunks][-1] == 6
    assert bytes(last.complete.output_ids) == b"abcabc"
    assert (last.complete.finish_reason, last.complete.prompt_tokens, last.complete.completion_tokens) == (
        "length",
        3,
        6,
    )


def test_without_stream_there_is_one_message(stub: VllmEngineStub) -> None:
    [whole] = stub.Generate(request("abc", stream=False), timeout=WAIT)
    assert bytes(whole.complete.output_ids) == b"abcabc"


def test_text_is_tokenised_here(stub: VllmEngineStub) -> None:
    [whole] = stub.Generate(
        vllm.GenerateRequest(text="xy", sampling_params=vllm.SamplingParams(temperature=0, max_tokens=2)), timeout=WAIT
    )
    assert bytes(whole.complete.output_ids) == b"xy"


def test_answers_and_what_ended_them(stub: VllmEngineStub) -> None:
    [stopped] = stub.Generate(request("hello", stream=False, max_tokens=20, stop=["lo"]), timeout=WAIT)
    assert (stopped.complete.finish_reason, stopped.complete.matched_stop_str) == ("stop", "lo")
    [token] = stub.Generate(request("hello", stream=False, stop_token_ids=[ord("l")]), timeout=WAIT)
    assert (token.complete.finish_reason, token.complete.matched_token_id) == ("stop", ord("l"))
    several = [message.complete for message in stub.Generate(request("abc", stream=False, n=3), timeout=WAIT)]
    assert sorted((answer.index, bytes(answer.output_ids)) for answer in several) == [(i, b"abcabc") for i in range(3)]


def test_an_unset_temperature_is_one_and_zeros_are_unset() -> None:
    asked = vllm.SamplingParams(top_p=0.0, top_k=0, min_p=0.0, repetition_penalty=0.0, max_tokens=3, seed=-1)
    message = generation(vllm.GenerateRequest(text="x", sampling_params=asked))
    assert message.sampling == pb.SamplingConfig(temperature=1.0, seed=2**32 - 1)
    assert message.stop == pb.StopConfig(max_tokens=3, ignore_eos=False)


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling_params.constraint", {"regex": "a+"}),
        ("sampling_params.prompt_logprobs", {"prompt_logprobs": 1}),
        ("sampling_params.truncate_prompt_tokens", {"truncate_prompt_tokens": -1}),
        ("sampling_params.logprobs", {"logprobs": -1}),
        ("sampling_params.logit_bias", {"logit_bias": {-1: 1.0}}),
        ("sampling.top_p", {"top_p": 7.0}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(stub: VllmEngineStub, field: str, sampling: dict[str, object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request("abc", **sampling), timeout=WAIT))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in caught.value.details()
    assert refusal_of(caught.value).reason == "INVALID_FIELD"


def test_every_method_of_the_contract_is_answered_or_refused_by_name(service: Service, stub: VllmEngineStub) -> None:
    """Whatever the published descriptor lists, with an empty message; a generic handler of gRPC would say INTERNAL."""
    outcomes = {}
    for method in vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods:
        asked = GetMessageClass(method.input_type)()
        try:
            answer = getattr(stub, method.name)(asked, timeout=WAIT)
            if method.server_streaming:
                next(answer)
                answer.cancel()
            outcomes[method.name] = True
        except grpc.RpcError as error:
            outcomes[method.name] = (error.code().name, refusal_of(error).reason)
    unsupported = dict.fromkeys(("Embed", "StartProfile", "StopProfile"), ("UNIMPLEMENTED", "UNSUPPORTED"))
    assert outcomes == dict.fromkeys(outcomes, True) | unsupported | {"Generate": ("INVALID_ARGUMENT", "INVALID_FIELD")}
    assert len(outcomes) >= 12


def test_abort_ends_a_stream_and_frees_its_blocks(service: Service, stub: VllmEngineStub) -> None:
    call = stub.Generate(request("abc", request_id="long", max_tokens=900), timeout=WAIT)
    next(iter(call))
    stub.Abort(vllm.AbortRequest(request_ids=["long", "nobody"]), timeout=WAIT)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert refusal_of(caught.value).reason == "ABORTED"
    wait_until(service.is_idle, "its blocks are free")


def test_nobody_aborts_another_tenants_stream(stub: VllmEngineStub) -> None:
    call = stub.Generate(request("abc", request_id="long", max_tokens=900), timeout=WAIT)
    next(iter(call))  # unread, it stays open
    others = (("x-pagestream-tenant", "somebody else"),)
    stub.Abort(vllm.AbortRequest(request_ids=["long"]), timeout=WAIT, metadata=others)
    assert list(call)[-1].complete.completion_tokens == 900


def test_facts_for_routers(service: Service, stub: VllmEngineStub) -> None:
    assert stub.HealthCheck(vllm.HealthCheckRequest(), timeout=WAIT).healthy
    model = stub.GetModelInfo(vllm.GetModelInfoRequest(), timeout=WAIT)
    assert (model.served_model_name, model.vocab_size, list(model.eos_token_ids)) == ("echo", 258, [END])
    assert model.max_req_input_len == service.rig.pool.capacity - 1
    server = stub.GetServerInfo(vllm.GetServerInfoRequest(), timeout=WAIT)
    assert (server.server_type, server.block_size) == ("vllm-grpc", service.rig.pool.block_size)
    [load] = stub.GetLoads(vllm.GetLoadsRequest(), timeout=WAIT).loads
    assert (load.num_total_reqs, load.max_total_num_tokens) == (0, service.rig.pool.capacity)
    service.metrics.state = ServerState.DRAINING
    assert not stub.HealthCheck(vllm.HealthCheckRequest(), timeout=WAIT).healthy


def test_the_tokenizer_is_an_archive_with_its_digest(stub: VllmEngineStub) -> None:
    chunks = list(stub.GetTokenizer(common.GetTokenizerRequest(), timeout=WAIT))
    archive = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks][-1] == hashlib.sha256(archive).hexdigest()
    assert set(zipfile.ZipFile(io.BytesIO(archive)).namelist()) == {"tokenizer.json", "tokenizer_config.json"}


def test_flushing_frees_what_nobody_holds(service: Service, stub: VllmEngineStub) -> None:
    list(stub.Generate(request("a" * 100), timeout=WAIT))
    wait_until(lambda: service.rig.pool.num_cached > 0, "the prompt is cached")
    assert stub.FlushCache(common.FlushCacheRequest(), timeout=WAIT).success
    assert service.rig.pool.num_cached == 0
    assert service.rig.pool.num_free == service.rig.pool.num_blocks


def test_events_tell_of_the_cache_and_the_load(service: Service, stub: VllmEngineStub) -> None:
    size = service.rig.pool.block_size
    prompt = "".join(chr(97 + i % 26) for i in range(3 * size))
    list(stub.Generate(request(prompt, max_tokens=1), timeout=WAIT))
    stream = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(), timeout=WAIT)
    events = list(next(stream).events)
    assert events[0].HasField("cleared")
    stored = [event.stored for event in events[1:]]
    assert [bytes(page.blocks[0].token_ids).decode() for page in stored] == [
        prompt[i : i + size] for i in range(0, 3 * size, size)
    ]
    hashes = [page.blocks[0].block_hash for page in stored]
    assert [page.parent_block_hash if page.HasField("parent_block_hash") else None for page in stored] == [
        None,
        *hashes[:-1],
    ]
    stub.FlushCache(common.FlushCacheRequest(), timeout=WAIT)
    removed = next(batch for batch in stream if batch.events)
    assert [event.removed.block_hashes[0] for event in removed.events] == hashes[::-1]
    idle = next(batch for batch in stream if batch.load.load_only)
    assert idle.sequence_number == removed.sequence_number
    stream.cancel()


def test_a_watch_knows_what_the_cache_holds() -> None:
    """Pages that come and go at random, of two tenants, against the pool's own list; one that does not read starts
    anew and knows it too."""
    rng, pool = random.Random(0), BlockPool(64, 4)
    cache = CacheWatch(pool)
    watch, idle = cache.open("a"), cache.open("a")
    known: dict[int, FullPage] = {}
    for _ in range(3000):
        tenant = rng.choice("ab")
        tokens = [rng.randrange(3) for _ in range(rng.randrange(4, 20))]
        blocks = pool.allocate(pool.blocks_for(len(tokens)))
        pool.keep(tenant, tokens, blocks, 0, len(tokens))
        pool.release(blocks)
        follow(known, cache.read(watch))
        assert known == {page.number: page for page in pool.full_pages("a")}
        assert all(page.parent is None or page.parent in known for page in known.values())
        assert len(idle.unread) <= MAX_UNREAD
    late: dict[int, FullPage] = {}
    follow(late, cache.read(idle))
    assert late == known


def follow(known: dict[int, FullPage], news: Changes) -> None:
    if news.starts_anew:
        known.clear()
    for change in news.changes:
        if isinstance(change, int):
            del known[change]
        else:
            known[change.number] = change
