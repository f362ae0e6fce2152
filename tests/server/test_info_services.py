"""Tokenizer, model, health and reflection services; the counts of calls."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pagestream.v1 import model_pb2, tokenizer_pb2
from tests.support.client import NOT_SERVING, SERVING, refusal_of, refused
from tests.support.fakes import END
from tests.support.service import KV_CAPACITY, MAX_CONTEXT, Service, stop
from tests.support.waiting import WAIT, wait_until


def test_the_tokenizer_service_goes_there_and_back(service: Service) -> None:
    tokenizer = service.client.tokenizer
    for text in ("", "plain", "naïve 🎉\n\x00"):
        ids = tokenizer.Encode(tokenizer_pb2.EncodeRequest(text=text), timeout=WAIT).token_ids
        assert list(ids) == list(text.encode())
        assert tokenizer.Decode(tokenizer_pb2.DecodeRequest(token_ids=ids), timeout=WAIT).text == text
    half = tokenizer_pb2.DecodeRequest(token_ids=[*"é".encode()[:1], END])
    assert tokenizer.Decode(half, timeout=WAIT).text == "\ufffd"
    half.special_tokens = True
    assert tokenizer.Decode(half, timeout=WAIT).text.endswith("<end>")


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason", "field"),
    [
        ("Decode", tokenizer_pb2.DecodeRequest(token_ids=[258]), "INVALID_ARGUMENT", "INVALID_FIELD", "token_ids"),
        ("ApplyTemplate", tokenizer_pb2.ApplyTemplateRequest(), "INVALID_ARGUMENT", "INVALID_FIELD", "chat.messages"),
        (
            "ApplyTemplate",
            tokenizer_pb2.ApplyTemplateRequest(chat={"messages": [{"content": "x"}]}),
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "chat.messages[0].role",
        ),
        ("Encode", tokenizer_pb2.EncodeRequest(model="other"), "NOT_FOUND", "UNKNOWN_MODEL", None),
    ],
)
def test_refusals_of_the_tokenizer_service(
    service: Service, method: str, request_: Any, code: str, reason: str, field: str | None
) -> None:
    with refused(code, reason) as refusal:
        getattr(service.client.tokenizer, method)(request_, timeout=WAIT)
    assert refusal.got.fields == ([field] if field else [])


def test_the_model_service_tells_the_facts(service: Service) -> None:
    models = service.client.models
    expected = model_pb2.ModelInfo(
        name="models/echo",
        architecture="llama",
        parameters=123,
        vocab_size=258,
        max_context_tokens=MAX_CONTEXT,
        kv_capacity_tokens=KV_CAPACITY,
        page_size=16,
        device="cpu",
        dtype="fp32",
        kv_dtype="bf16",
        has_chat_template=True,
        eos_token_ids=[END],
    )
    for name in ("", "echo", "models/echo"):
        assert models.GetModel(model_pb2.GetModelRequest(name=name), timeout=WAIT).model == expected
    assert list(models.ListModels(model_pb2.ListModelsRequest(), timeout=WAIT).models) == [expected]
    with refused("NOT_FOUND", "UNKNOWN_MODEL"):
        models.GetModel(model_pb2.GetModelRequest(name="models/other"), timeout=WAIT)


def test_reflection_lists_and_describes_our_services(service: Service) -> None:
    database = ProtoReflectionDescriptorDatabase(service.client.channel)
    ours = {f"pagestream.v1.{name}Service" for name in ("Generation", "Tokenizer", "Model")}
    assert ours | {"grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("pagestream.v1.GenerationService")
    assert [method.name for method in file.service[0].method] == ["GenerateStream", "Generate"]


def test_calls_are_counted_by_method_and_code(service: Service) -> None:
    service.client.stream(text="x", stop=stop(1))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        service.client.generate()
    values = service.metrics.read().values
    prefix = "/pagestream.v1.GenerationService/"
    wait_until(service.is_idle, "both calls are over")
    assert values["grpc_server_started_total"] == {(prefix + "GenerateStream",): 1, (prefix + "Generate",): 1}
    handled = service.metrics.read().values["grpc_server_handled_total"]
    assert handled == {(prefix + "GenerateStream", "OK"): 1, (prefix + "Generate", "INVALID_ARGUMENT"): 1}


def test_an_oversized_message_is_refused_and_the_connection_lives(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as error:
        service.client.stream(text="x" * (17 * 2**20))
    assert refusal_of(error.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.client.stream(text="ab", stop=stop(2)).text == "ab"


def test_watchers_of_health_hear_of_every_change(service: Service) -> None:
    heard = service.client.watch()
    assert next(heard) == NOT_SERVING
    for serving in (True, False, True):
        service.run(service.listener.set_serving(serving=serving))
        assert next(heard) == (SERVING if serving else NOT_SERVING)
    assert service.client.health("liveness") == SERVING


def test_metadata_has_a_limit_and_the_connection_lives(service: Service) -> None:
    request = model_pb2.GetModelRequest()
    with pytest.raises(grpc.RpcError) as error:
        service.client.models.GetModel(request, timeout=WAIT, metadata=(("x", "y" * 20_000),))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.client.models.GetModel(request, timeout=WAIT).model.name == "models/echo"
