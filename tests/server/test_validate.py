"""Every field of a request: what is refused, by which name, and what unset means."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration

from pagestream.model.step import SamplingParams
from pagestream.server import validate
from pagestream.server.errors import InvalidFieldError
from pagestream.server.validate import StopRules
from pagestream.v1 import generation_pb2 as pb

VOCAB = 300
EOS = (7, 9)


def check(message: pb.GenerateStreamRequest) -> tuple[StopRules, SamplingParams, float]:
    """All checks, in the order of prepare.py."""
    validate.check_prompt(message, VOCAB)
    stop = validate.stop_rules(message.stop, EOS, VOCAB)
    sampling = validate.sampling_params(message.sampling, message.output, message.stop.min_tokens, stop, VOCAB)
    return stop, sampling, validate.progress_interval(message.output)


def request(
    sampling: dict[str, object] | None = None,
    stop: dict[str, object] | None = None,
    output: dict[str, object] | None = None,
    **fields: object,
) -> pb.GenerateStreamRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "x"
    return pb.GenerateStreamRequest(
        sampling=pb.SamplingConfig(**(sampling or {})),
        stop=pb.StopConfig(**(stop or {})),
        output=pb.OutputConfig(**(output or {})),
        **fields,
    )


BELOW_ZERO, INF, NAN = -1e-6, math.inf, math.nan

REFUSED = [
    (pb.GenerateStreamRequest(), "prompt"),
    (request(text=""), "text"),
    (request(token_ids=pb.TokenIds()), "token_ids.ids"),
    (request(token_ids=pb.TokenIds(ids=[VOCAB - 1, VOCAB])), "token_ids.ids"),
    (request(token_ids=pb.TokenIds(ids=[2**32 - 1])), "token_ids.ids"),
    (request(chat=pb.Chat()), "chat.messages"),
    (
        request(chat=pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(content="x")])),
        "chat.messages[1].role",
    ),
    (request(request_id="é" * 65), "request_id"),
    *((request(sampling={"temperature": value}), "sampling.temperature") for value in (BELOW_ZERO, 100.5, INF, NAN)),
    (request(sampling={"top_k": 0}), "sampling.top_k"),
    *((request(sampling={"top_p": value}), "sampling.top_p") for value in (0, BELOW_ZERO, 1.001, NAN)),
    *((request(sampling={"min_p": value}), "sampling.min_p") for value in (BELOW_ZERO, 1.001, NAN)),
    *(
        (request(sampling={"repetition_penalty": value}), "sampling.repetition_penalty")
        for value in (0, 1e-38, 0.0099, -1, 10.5, INF, NAN)
    ),
    *(
        (request(sampling={name: value}), f"sampling.{name}")
        for name in ("presence_penalty", "frequency_penalty")
        for value in (-2.001, 2.001, -INF, NAN)
    ),
    *((request(sampling={"logit_bias": {3: value}}), "sampling.logit_bias") for value in (-100.5, 100.5, INF, NAN)),
    (request(sampling={"logit_bias": {VOCAB: 1.0}}), "sampling.logit_bias"),
    (request(stop={"max_tokens": 0}), "stop.max_tokens"),
    (request(stop={"max_tokens": 3, "min_tokens": 4}), "stop.min_tokens"),
    (request(stop={"stop_strings": ["x"] * 17}), "stop.stop_strings"),
    (request(stop={"stop_strings": ["ok", ""]}), "stop.stop_strings[1]"),
    (request(stop={"stop_strings": ["é" * 257]}), "stop.stop_strings[0]"),
    (request(stop={"stop_token_ids": [1] * 65}), "stop.stop_token_ids"),
    (request(stop={"stop_token_ids": [VOCAB]}), "stop.stop_token_ids"),
    (request(output={"logprobs": 21}), "output.logprobs"),
    *(
        (request(output={"progress_interval": duration}), "output.progress_interval")
        for duration in (
            Duration(nanos=-1),
            Duration(seconds=3601),
            Duration(seconds=2**62),
            Duration(seconds=-(2**62)),
        )
    ),
]


@pytest.mark.parametrize(("message", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_makes_no_sense_is_refused_by_the_name_of_its_field(message: pb.GenerateStreamRequest, field: str) -> None:
    with pytest.raises(InvalidFieldError) as refusal:
        check(message)
    assert refusal.value.field == field
    assert str(refusal.value).startswith(field)


@pytest.mark.parametrize(
    "message",
    [
        request(token_ids=pb.TokenIds(ids=[0, VOCAB - 1])),
        request(request_id="é" * 64),
        request(sampling={"temperature": 100, "top_p": 1, "min_p": 1, "repetition_penalty": 10, "top_k": 2**32 - 1}),
        request(sampling={"repetition_penalty": 0.01}),
        request(sampling={"presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {0: -100, VOCAB - 1: 100}}),
        request(stop={"max_tokens": 4, "min_tokens": 4, "stop_strings": ["é" * 256] * 16}),
        request(stop={"max_tokens": 2**32 - 1, "stop_token_ids": [VOCAB - 1] * 64}),
        request(stop={"min_tokens": 5}),
        request(output={"logprobs": 20, "progress_interval": Duration(seconds=3600)}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(message: pb.GenerateStreamRequest) -> None:
    check(message)


def test_unset_means_the_defaults_of_the_proto() -> None:
    stop, sampling, interval = check(pb.GenerateStreamRequest(text="x"))
    assert stop == StopRules(None, (), frozenset(), frozenset(EOS))
    assert sampling == SamplingParams(seed=sampling.seed, suppressed_until_min_tokens=frozenset(EOS))
    assert interval == 0.25


def test_end_tokens_that_the_network_was_never_given_are_left_out() -> None:
    """A tokenizer may hold more tokens than the embedding has rows; no logit of theirs could be suppressed."""
    assert validate.stop_rules(pb.StopConfig(), (7, VOCAB), VOCAB).eos_token_ids == {7}


def test_zero_is_not_unset() -> None:
    message = request(
        sampling={"temperature": 0, "seed": 0, "min_p": 0}, output={"logprobs": 0, "progress_interval": Duration()}
    )
    _, sampling, interval = check(message)
    assert (sampling.seed, sampling.logprobs, interval) == (0, 0, 0.0)


def test_seeds_are_drawn_anew_for_each_request() -> None:
    drawn = {check(request(sampling={"temperature": 1}))[1].seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_end_tokens_are_suppressed_before_min_tokens_unless_ignored() -> None:
    fields: dict[str, object] = {"min_tokens": 3, "stop_token_ids": [5]}
    _, sampling, _ = check(request(stop=fields))
    assert (sampling.min_tokens, sampling.suppressed_until_min_tokens) == (3, {5, 7, 9})
    stop, sampling, _ = check(request(stop=fields | {"ignore_eos": True}))
    assert stop.eos_token_ids == frozenset()
    assert sampling.suppressed_until_min_tokens == {5}
