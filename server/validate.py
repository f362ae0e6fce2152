"""Messages in, domain values out: every field of a request is checked here, once, and nothing unchecked goes further.

The ranges are those that protos/pagestream/v1/generation.proto promises.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from pagestream.model.step import SamplingParams
from pagestream.server.errors import InvalidFieldError
from pagestream.server.request import Priority
from pagestream.server.stats import Span, StatsDetail, StatsRequest
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2, stats_pb2

MAX_ANSWERS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 512
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_REQUEST_ID_BYTES = 128
MAX_ATTENTION_EVERY = 4096
MAX_SPANS = 64
MAX_SPAN_NAME = 64  # characters
_LEAST_PENALTY = pb.SamplingConfig(repetition_penalty=0.01).repetition_penalty  # what a float on the wire makes of it
_TEXT_BYTES_PER_TOKEN = 128  # more than the longest tokens there are; text has 4
_LEAST_TEXT_BYTES = 8 * 2**20  # is always tokenised, to tell how many tokens it has

_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_HIGH: Priority.HIGH,
}

Number = TypeVar("Number", int, float)
GenerateMessage = pb.GenerateRequest | pb.GenerateStreamRequest
ScoreMessage = insight_pb2.ScoreRequest | insight_pb2.AblateSpansRequest
PromptMessage = GenerateMessage | ScoreMessage | insight_pb2.EstimateRequest


@dataclass(frozen=True, slots=True)
class StopRules:
    """When an answer ends."""

    max_tokens: int | None  # None: as many as fit
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]  # empty when the client ignores them


def sampling_params(
    sampling: pb.SamplingConfig, output: pb.OutputConfig, min_tokens: int, stop: StopRules, vocab_size: int
) -> SamplingParams:
    """Fills in the defaults and draws a seed where none is given. Raises InvalidFieldError."""
    _check_tokens("sampling.logit_bias", sampling.logit_bias, vocab_size, MAX_LOGIT_BIASES)
    for bias in sampling.logit_bias.values():
        _check_range("sampling.logit_bias", bias, -100, 100)
    return SamplingParams(
        temperature=_number(sampling, "temperature", 0.0, 0, 100),
        top_k=_check_range("sampling.top_k", sampling.top_k, 1, math.inf) if sampling.HasField("top_k") else None,
        top_p=_number(sampling, "top_p", 1.0, 0, 1, open_below=True),
        min_p=_number(sampling, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(sampling, "repetition_penalty", 1.0, _LEAST_PENALTY, 10),
        presence_penalty=_number(sampling, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(sampling, "frequency_penalty", 0.0, -2, 2),
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        logprobs=(
            _check_range("output.logprobs", output.logprobs, 0, MAX_LOGPROBS) if output.HasField("logprobs") else None
        ),
        min_tokens=min_tokens,
        suppressed_until_min_tokens=stop.eos_token_ids | stop.stop_token_ids,
    )


def stop_rules(stop: pb.StopConfig, eos_token_ids: tuple[int, ...], vocab_size: int) -> StopRules:
    """Raises InvalidFieldError."""
    if stop.HasField("max_tokens"):
        _check_range("stop.max_tokens", stop.max_tokens, 1, math.inf)
        _check_range("stop.min_tokens", stop.min_tokens, 0, stop.max_tokens)
    if len(stop.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidFieldError("stop.stop_strings", f"at most {MAX_STOP_STRINGS} are allowed")
    for index, text in enumerate(stop.stop_strings):
        if not 1 <= len(text.encode()) <= MAX_STOP_STRING_BYTES:
            raise InvalidFieldError(f"stop.stop_strings[{index}]", f"must have 1 to {MAX_STOP_STRING_BYTES} bytes")
    _check_tokens("stop.stop_token_ids", stop.stop_token_ids, vocab_size, MAX_STOP_TOKENS)
    return StopRules(
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        stop_strings=tuple(stop.stop_strings),
        stop_token_ids=frozenset(stop.stop_token_ids),
        eos_token_ids=frozenset() if stop.ignore_eos else frozenset(t for t in eos_token_ids if t < vocab_size),
    )


def check_prompt(request: PromptMessage, vocab_size: int) -> None:
    """Checks what can be checked without tokenising. Raises InvalidFieldError."""
    if isinstance(request, GenerateMessage) and len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidFieldError("request_id", f"must have at most {MAX_REQUEST_ID_BYTES} bytes")
    match request.WhichOneof("prompt"):
        case None:
            raise InvalidFieldError("prompt", "one of text, token_ids and chat must be set")
        case "text":
            if not request.text:
                raise InvalidFieldError("text", "must not be empty")
        case "token_ids":
            if not request.token_ids.ids:
                raise InvalidFieldError("token_ids.ids", "must not be empty")
            _check_tokens("token_ids.ids", request.token_ids.ids, vocab_size, len(request.token_ids.ids))
        case "chat":
            check_chat(request.chat)


def check_chat(chat: pb.Chat) -> None:
    """Raises InvalidFieldError."""
    if not chat.messages:
        raise InvalidFieldError("chat.messages", "must not be empty")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidFieldError(f"chat.messages[{index}].role", "must not be empty")


def check_text(field: str, text: str, max_context: int) -> None:
    """Raises InvalidFieldError for a text so long that tokenising it, seconds a MB, can only end in a refusal."""
    most = max(_LEAST_TEXT_BYTES, _TEXT_BYTES_PER_TOKEN * max_context)
    if len(text.encode()) > most:
        raise InvalidFieldError(field, f"must have at most {most} bytes")


def num_answers(request: GenerateMessage) -> int:
    """Raises InvalidFieldError."""
    return _check_range("n", request.n or 1, 1, MAX_ANSWERS)


def progress_interval(output: pb.OutputConfig) -> float:
    """Seconds. Raises InvalidFieldError."""
    if not output.HasField("progress_interval"):
        return 0.25
    return _seconds("output.progress_interval", output.progress_interval, 0)


def queue_timeout(request: GenerateMessage) -> float | None:
    """Seconds. Raises InvalidFieldError."""
    return _seconds("queue_timeout", request.queue_timeout, 0.001) if request.HasField("queue_timeout") else None


def priority(request: GenerateMessage | ScoreMessage) -> Priority:
    """Raises InvalidFieldError."""
    if request.priority not in _PRIORITIES:
        raise InvalidFieldError("priority", f"{request.priority} is not one of pagestream.v1.Priority")
    return _PRIORITIES[request.priority]


def check_answer(request: ScoreMessage, vocab_size: int) -> None:
    """Raises InvalidFieldError."""
    if not request.answer_token_ids:
        raise InvalidFieldError("answer_token_ids", "must not be empty")
    _check_tokens("answer_token_ids", request.answer_token_ids, vocab_size, len(request.answer_token_ids))


def stats_request(stats: stats_pb2.StatsOptions, page_tokens: int) -> StatsRequest:
    """All but where spans end, for which see check_stats_spans. Raises InvalidFieldError."""
    if stats.level not in stats_pb2.StatsLevel.values():
        raise InvalidFieldError("stats.level", f"{stats.level} is not one of pagestream.v1.StatsLevel")
    detail = StatsDetail(stats.level or StatsDetail.OFF)
    every = 32 if detail is StatsDetail.SPANS else 1
    if stats.HasField("attention_every"):
        every = _check_range("stats.attention_every", stats.attention_every, 1, MAX_ATTENTION_EVERY)
    if stats.spans and detail is not StatsDetail.SPANS:
        raise InvalidFieldError("stats.spans", "need the level STATS_LEVEL_SPANS")
    return StatsRequest(detail, every, spans("stats.spans", stats.spans), page_tokens)


def spans(field: str, messages: Sequence[stats_pb2.Span]) -> tuple[Span, ...]:
    """All but where they end, for which see check_spans. Raises InvalidFieldError."""
    if len(messages) > MAX_SPANS:
        raise InvalidFieldError(field, f"at most {MAX_SPANS} are allowed")
    names: set[str] = set()
    for index, span in enumerate(messages):
        if not 1 <= len(span.name) <= MAX_SPAN_NAME:
            raise InvalidFieldError(f"{field}[{index}].name", f"must have 1 to {MAX_SPAN_NAME} characters")
        if span.name in names:
            raise InvalidFieldError(f"{field}[{index}].name", "is that of another span")
        names.add(span.name)
    return tuple(Span(span.name, span.begin_token, span.end_token) for span in messages)


def check_spans(field: str, spans: Sequence[Span], num_prompt_tokens: int) -> None:
    """Raises InvalidFieldError for a span that is empty or ends behind the prompt."""
    for index, span in enumerate(spans):
        if not span.begin < span.end <= num_prompt_tokens:
            limit = f"must be above begin_token and at most the prompt's length, {num_prompt_tokens}"
            raise InvalidFieldError(f"{field}[{index}].end_token", f"{limit}, not {span.end}")


def check_ablated(spans: Sequence[Span], num_prompt_tokens: int) -> None:
    """That there is something to leave out, and something left. Raises InvalidFieldError."""
    if not spans:
        raise InvalidFieldError("spans", "there must be at least one")
    check_spans("spans", spans, num_prompt_tokens)
    for index, span in enumerate(spans):
        if span.end - span.begin == num_prompt_tokens:
            raise InvalidFieldError(f"spans[{index}]", "must not be the whole prompt: the answer must follow something")


def _seconds(name: str, duration: Duration, low: float) -> float:
    return _check_range(name, duration.seconds + duration.nanos / 1e9, low, 3600)  # not ToTimedelta: it overflows


def _number(
    sampling: pb.SamplingConfig, name: str, default: float, low: float, high: float, *, open_below: bool = False
) -> float:
    if not sampling.HasField(name):  # type: ignore[arg-type]  # the stubs want a literal
        return default
    value: float = getattr(sampling, name)
    if open_below and value == low:
        raise InvalidFieldError(f"sampling.{name}", f"must be above {low:g}")
    return _check_range(f"sampling.{name}", value, low, high)


def _check_range(name: str, value: Number, low: float, high: float) -> Number:
    if not low <= value <= high:  # also refuses NaN
        limit = f"must be from {low:g} to {high:g}" if high < math.inf else f"must be at least {low:g}"
        raise InvalidFieldError(name, f"{limit}, not {value:g}")
    return value


def _check_tokens(name: str, ids: Collection[int], vocab_size: int, limit: int) -> None:
    if len(ids) > limit:
        raise InvalidFieldError(name, f"at most {limit} tokens are allowed")
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidFieldError(name, f"token {largest} is outside the vocabulary of {vocab_size}")
