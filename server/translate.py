"""Domain values out, messages back: what the engine says, as pagestream.v1 messages."""

from __future__ import annotations

from dataclasses import asdict

from google.protobuf import duration_pb2

from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server import events
from pagestream.server.forecast import Estimate
from pagestream.server.job import Job
from pagestream.server.request import FinishReason
from pagestream.server.stats import RequestStats, TokenStats
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2, stats_pb2

_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.MAX_CONTEXT: pb.FINISH_REASON_MAX_CONTEXT,
}


def accepted(job: Job, queue_position: int) -> pb.Accepted:
    request = job.request
    return pb.Accepted(
        request_id=request.request_id,
        prompt_tokens=request.num_prompt_tokens,
        queue_position=queue_position,
        max_tokens=request.max_new_tokens,
        sampling=_sampling(request.sampling),
    )


def estimate(forecast: Estimate) -> insight_pb2.EstimateResponse:
    return insight_pb2.EstimateResponse(
        prompt_tokens=forecast.prompt_tokens,
        cached_tokens=forecast.cached_tokens,
        time_to_first_token=_duration(forecast.first_token),
        queue=_duration(forecast.queue),
        stall_for_others=_duration(forecast.stall_for_others),
        gap_after=_duration(forecast.gap_after),
        extrapolated=forecast.extrapolated,
        samples=forecast.samples,
    )


def progress(event: events.Progress) -> pb.PrefillProgress:
    return pb.PrefillProgress(computed_tokens=event.computed_tokens, total_tokens=event.total_tokens)


def delta(event: events.Delta, output: pb.OutputConfig) -> pb.Delta:
    return pb.Delta(
        text=event.text,
        token_ids=[token.token_id for token in event.tokens] if output.token_ids else (),
        logprobs=[_logprob(token, token.logprob) for token in event.tokens if token.logprob is not None],
        index=event.index,
        stats=map(_token_stats, event.stats),
    )


def _token_stats(stats: TokenStats) -> stats_pb2.TokenStats:
    """Field by field: `asdict` copies deeply, and this is done for every token."""
    output, attention = stats.output, stats.attention
    return stats_pb2.TokenStats(
        context_tokens=stats.context_tokens,
        gap=_duration(stats.gap),
        predicted_gap=_duration(stats.predicted_gap),
        stall=_duration(stats.stall),
        output=None
        if output is None
        else stats_pb2.OutputStats(
            entropy_nats=output.entropy_nats,
            top1_probability=output.top1_probability,
            margin=output.margin,
            surprisal_nats=output.surprisal_nats,
            sampling_surprisal_nats=output.sampling_surprisal_nats,
        ),
        attention=None
        if attention is None
        else stats_pb2.TokenAttention(
            entropy_nats=attention.entropy_nats,
            effective_context_tokens=attention.effective_context_tokens,
            sink_mass=attention.sink_mass,
            recent_mass=attention.recent_mass,
        ),
    )


def _request_stats(stats: RequestStats) -> stats_pb2.RequestStats:
    stalls = {name: _duration(getattr(stats, name)) for name in ("stall_suffered", "stall_caused")}
    return stats_pb2.RequestStats(**asdict(stats) | stalls)


def _logprob(token: SampledToken, logprob: float) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in token.top_logprobs]
    return pb.TokenLogprob(token_id=token.token_id, logprob=logprob, top=top)


def finished(event: events.Finished) -> pb.Finished:
    return pb.Finished(
        reason=_REASONS[event.reason],
        matched_stop=event.matched_stop or "",
        matched_stop_token_id=event.matched_stop_token_id,
        usage=pb.Usage(
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            output_tokens=event.output_tokens,
            preemptions=event.preemptions,
        ),
        timings=_timings(event.timings),
        index=event.index,
        stats=None if event.stats is None else _request_stats(event.stats),
    )


def _sampling(params: SamplingParams) -> pb.SamplingConfig:
    return pb.SamplingConfig(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
    )


def _timings(timings: events.Timings) -> pb.Timings:
    gaps = sorted(timings.gaps)
    return pb.Timings(
        queue=_duration(timings.queue),
        prefill=_duration(timings.prefill),
        decode=_duration(timings.decode),
        time_to_first_token=_duration(timings.time_to_first_token),
        inter_token_p50=_duration(events.nearest_rank(gaps, 0.50)),
        inter_token_p99=_duration(events.nearest_rank(gaps, 0.99)),
        predicted_time_to_first_token=_duration(timings.predicted_time_to_first_token),
    )


def _duration(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    whole, fraction = divmod(max(seconds, 0.0), 1.0)
    return duration_pb2.Duration(seconds=int(whole), nanos=int(fraction * 1e9))
