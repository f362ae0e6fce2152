"""Answers over a real port, from a model that repeats its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import tokenizer_pb2
from tests.support.fakes import END
from tests.support.service import KV_CAPACITY, Service, stop
from tests.support.waiting import WAIT

MakeService = Callable[..., Service]


def test_generate_is_the_stream_gathered(service: Service) -> None:
    fields: dict[str, Any] = {
        "text": "naïve café 🎉 ",
        "request_id": "r",
        "stop": stop(40),
        "output": pb.OutputConfig(token_ids=True),
        "sampling": pb.SamplingConfig(temperature=0.5, seed=2**64 - 1),
    }
    streamed, whole = service.client.stream(**fields), service.client.generate(**fields)
    for times in (streamed.finished, whole.finished):
        times.ClearField("timings")
    assert whole.finished.usage.cached_tokens == 17  # all but the last
    whole.finished.usage.ClearField("cached_tokens")
    assert whole == pb.GenerateResponse(
        accepted=streamed.accepted, text=streamed.text, token_ids=streamed.token_ids, finished=streamed.finished
    )
    expected = list(("naïve café 🎉 " * 3).encode())[:40]
    assert streamed.token_ids == expected
    assert streamed.text == bytes(expected).decode(errors="replace")
    assert streamed.accepted.sampling.seed == 2**64 - 1
    assert streamed.finished.usage == pb.Usage(prompt_tokens=18, output_tokens=40)


def test_unset_settings_are_reported_as_they_will_be_used(service: Service) -> None:
    accepted = service.client.stream(text="x", stop=stop(1)).accepted
    assert len(accepted.request_id) == 32
    assert accepted.sampling.HasField("seed")
    assert not accepted.sampling.HasField("top_k")
    assert (accepted.sampling.temperature, accepted.sampling.top_p, accepted.max_tokens) == (0, 1, 1)


def test_token_ids_and_logprobs_come_only_when_asked_for(service: Service) -> None:
    answer = service.client.stream(text="x", stop=stop(3))
    assert (answer.token_ids, answer.logprobs, answer.text) == ([], [], "xxx")


def test_deltas_never_end_in_half_a_character(service: Service) -> None:
    prompt = "日本🎉é"
    answer = service.client.stream(text=prompt, stop=stop(5 * len(prompt.encode())))
    assert answer.text == prompt * 5
    assert all("\ufffd" not in delta.text for delta in answer.deltas)


@pytest.mark.parametrize(
    ("stop_strings", "text", "matched"),
    [
        (["wor"], "hello ", "wor"),
        (["ld h"], "hello wor", "ld h"),  # over the end of the prompt's first repetition
        (["nowhere", "lo"], "hel", "lo"),
        (["h"], "", "h"),
        (["nowhere"], "hello world hello world ", ""),
        (["world hellX"], "hello world hello world ", ""),  # withheld in vain
    ],
)
def test_stop_strings_cut_exactly(service: Service, stop_strings: list[str], text: str, matched: str) -> None:
    answer = service.client.stream(text="hello world ", stop=stop(24, stop_strings=stop_strings))
    assert (answer.text, answer.finished.matched_stop) == (text, matched)
    expected = pb.FINISH_REASON_STOP_STRING if matched else pb.FINISH_REASON_MAX_TOKENS
    assert answer.finished.reason == expected


def test_the_models_end_token_ends_unless_ignored(service: Service) -> None:
    ids = pb.TokenIds(ids=[*b"ab", END])
    answer = service.client.stream(token_ids=ids, stop=stop(9), output=pb.OutputConfig(token_ids=True))
    assert (answer.text, answer.token_ids) == ("ab", [*b"ab", END])
    assert answer.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE
    assert not answer.finished.HasField("matched_stop_token_id")
    answer = service.client.stream(token_ids=ids, stop=stop(7, ignore_eos=True))
    assert (answer.text, answer.finished.reason) == ("ababa", pb.FINISH_REASON_MAX_TOKENS)
    shown = service.client.stream(
        token_ids=ids, stop=stop(4, ignore_eos=True), output=pb.OutputConfig(special_tokens=True)
    )
    assert shown.text == "ab<end>a"


def test_a_stop_token_ends_and_is_named(service: Service) -> None:
    finished = service.client.stream(text="abc", stop=stop(9, stop_token_ids=[ord("c")])).finished
    assert (finished.reason, finished.matched_stop_token_id) == (pb.FINISH_REASON_STOP_TOKEN, ord("c"))


def test_an_answer_without_a_limit_ends_where_the_pool_does(service: Service) -> None:
    answer = service.client.stream(text="abc")
    assert answer.accepted.max_tokens == KV_CAPACITY - 3
    assert answer.finished.reason == pb.FINISH_REASON_MAX_CONTEXT
    assert answer.finished.usage.output_tokens == KV_CAPACITY - 3


def test_progress_comes_for_every_step_of_a_long_prompt(service: Service) -> None:
    service.rig.runner.hold()
    call = service.client.open(
        text="x" * 300, stop=stop(1), output=pb.OutputConfig(progress_interval=Duration(seconds=0))
    )
    next(call)
    for computed in (64, 128, 192, 256):  # the token budget; without the holds a busy reader may miss some
        service.rig.runner.allow(1)
        assert next(call).prefill_progress == pb.PrefillProgress(computed_tokens=computed, total_tokens=300)
    service.rig.runner.allow()
    assert [event.WhichOneof("event") for event in call] == ["delta", "finished"]


def test_a_chat_is_the_rendered_template_as_it_is(make_service: MakeService) -> None:
    client = make_service("<{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}>").client
    messages = [pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant", content="ho")]
    rendered = client.tokenizer.ApplyTemplate(
        tokenizer_pb2.ApplyTemplateRequest(chat=pb.Chat(messages=messages)), timeout=WAIT
    )
    assert rendered.text == "<u:hi;a:ho;>"
    chat = client.stream(chat=pb.Chat(messages=messages), stop=stop(30))
    ids = client.stream(token_ids=pb.TokenIds(ids=rendered.token_ids), stop=stop(30))
    assert chat.text == ids.text == (rendered.text * 3)[:30]
    assert chat.accepted.prompt_tokens == len(rendered.token_ids)
