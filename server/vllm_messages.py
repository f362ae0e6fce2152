"""vLLM's messages and ours: what the gateways that know `vllm.grpc.engine.VllmEngine` ask, as pagestream.v1."""

from __future__ import annotations

from collections.abc import Sequence

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common

from pagestream.model.step import SampledToken
from pagestream.server.cache_watch import Changes
from pagestream.server.errors import InvalidFieldError
from pagestream.server.events import Finished
from pagestream.server.request import FinishReason
from pagestream.server.snapshot import EngineSnapshot
from pagestream.v1 import generation_pb2 as pb

_ENDED_BY_LENGTH = (FinishReason.MAX_TOKENS, FinishReason.MAX_CONTEXT)


def generation(request: vllm.GenerateRequest) -> pb.GenerateStreamRequest:
    """Proto3 zeros mean what they mean to vLLM: unset, but for the temperature, which is 1 where it is not said.
    Raises InvalidFieldError for what we cannot do: what an answer must match, images, log-probabilities of the prompt.
    """
    _refuse_unsupported(request)
    asked = request.sampling_params
    sampling = pb.SamplingConfig(
        temperature=asked.temperature if asked.HasField("temperature") else 1.0,
        top_k=asked.top_k or None,
        top_p=asked.top_p or None,
        min_p=asked.min_p or None,
        repetition_penalty=asked.repetition_penalty or None,
        presence_penalty=asked.presence_penalty or None,
        frequency_penalty=asked.frequency_penalty or None,
        seed=asked.seed % 2**32 if asked.HasField("seed") else None,
    )
    for token, bias in asked.logit_bias.items():
        if token < 0:
            raise InvalidFieldError("sampling_params.logit_bias", f"token {token} is not in the vocabulary")
        sampling.logit_bias[token] = bias
    message = pb.GenerateStreamRequest(
        request_id=request.request_id,
        sampling=sampling,
        stop=pb.StopConfig(
            max_tokens=asked.max_tokens if asked.HasField("max_tokens") else None,
            min_tokens=asked.min_tokens or None,
            stop_strings=asked.stop,
            stop_token_ids=asked.stop_token_ids,
            ignore_eos=asked.ignore_eos,
        ),
        output=pb.OutputConfig(token_ids=True, logprobs=asked.logprobs if asked.HasField("logprobs") else None),
        n=asked.n,
    )
    if request.WhichOneof("input") == "tokenized":
        message.token_ids.ids.extend(request.tokenized.input_ids)
    else:
        message.text = request.text
    return message


def _refuse_unsupported(request: vllm.GenerateRequest) -> None:
    asked = request.sampling_params
    if asked.WhichOneof("constraint") is not None:
        raise InvalidFieldError("sampling_params.constraint", "constrained answers are not supported")
    for field in ("prompt_logprobs", "truncate_prompt_tokens"):
        if asked.HasField(field):
            raise InvalidFieldError(f"sampling_params.{field}", "is not supported")
    if asked.HasField("logprobs") and asked.logprobs < 0:
        raise InvalidFieldError("sampling_params.logprobs", "must not be negative: all of them are not supported")
    if request.HasField("mm_inputs") or request.extra_mm_inputs or request.HasField("media_refs"):
        raise InvalidFieldError("mm_inputs", "the model reads text alone")


def chunk(tokens: Sequence[SampledToken], counts: dict[str, int], index: int) -> vllm.GenerateResponse:
    """`counts`: prompt_tokens, completion_tokens up to here, cached_tokens."""
    return vllm.GenerateResponse(
        chunk=vllm.GenerateStreamChunk(
            token_ids=[token.token_id for token in tokens], output_logprobs=_logprobs(tokens), index=index, **counts
        )
    )


def complete(tokens: Sequence[SampledToken], counts: dict[str, int], end: Finished) -> vllm.GenerateResponse:
    """`tokens`: all of the answer."""
    return vllm.GenerateResponse(
        complete=vllm.GenerateComplete(
            output_ids=[token.token_id for token in tokens],
            output_logprobs=_logprobs(tokens),
            finish_reason="length" if end.reason in _ENDED_BY_LENGTH else "stop",
            matched_stop_str=end.matched_stop,
            matched_token_id=end.matched_stop_token_id,
            index=end.index,
            **counts,
        )
    )


def _logprobs(tokens: Sequence[SampledToken]) -> vllm.OutputLogProbs | None:
    if not tokens or tokens[0].logprob is None:
        return None
    tops = [
        vllm.TopLogProbs(
            values=[value for _, value in token.top_logprobs], token_ids=[t for t, _ in token.top_logprobs]
        )
        for token in tokens
    ]
    values = [token.logprob for token in tokens]
    return vllm.OutputLogProbs(token_logprobs=values, token_ids=[token.token_id for token in tokens], top_logprobs=tops)


def kv_events(changes: Changes, page_size: int) -> list[common.KvCacheEvent]:
    """Our numbers of pages stand for hashes: they are only ever compared with each other."""
    events = [common.KvCacheEvent(cleared=common.KvCacheCleared())] if changes.starts_anew else []
    for change in changes.changes:
        if isinstance(change, int):
            events.append(common.KvCacheEvent(removed=common.KvBlocksRemoved(block_hashes=[change])))
            continue
        block = common.KvBlock(block_hash=change.number, token_ids=change.tokens, block_size=page_size)
        stored = common.KvBlocksStored(blocks=[block], parent_block_hash=change.parent)
        events.append(common.KvCacheEvent(stored=stored))
    for number, event in enumerate(events):
        event.event_id = number
    return events


def engine_load(snapshot: EngineSnapshot, *, load_only: bool) -> common.EngineLoad:
    return common.EngineLoad(
        running_requests=len(snapshot.running_contexts),
        waiting_requests=len(snapshot.waiting_contexts),
        waiting_uncached_tokens=snapshot.waiting_prompt_tokens,
        token_usage=snapshot.kv_cache_usage_ratio,
        active_token_usage=snapshot.kv_cache_usage_ratio,
        load_only=load_only,
    )
