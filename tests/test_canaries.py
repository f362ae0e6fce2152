"""What canaries are for: a model that has lost its place scores known answers worse, a sound one always the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.config import RopeScaling
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import SamplingParams
from pagestream.server.block_pool import BlockPool
from pagestream.server.probes import Probe, make_probes
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler

ALERT = 0.3  # nats per token below the baseline


def load(path: Path, factor: float, kv_dtype: str) -> LoadedModel:
    """As it is served by default, with positions divided by a factor."""
    checkpoint = open_checkpoint(path)
    if factor != 1:
        scaling = RopeScaling("linear", factor, checkpoint.config.max_position)
        checkpoint.config = replace(checkpoint.config, rope_scaling=scaling)  # type: ignore[misc]
    options = {"dtype": "int4", "kv_dtype": kv_dtype, "device": "cpu", "page_size": 32, "max_context": 2048}
    return load_model(checkpoint, **options, token_budget=512, kv_memory=64 * 2**20)  # type: ignore[arg-type]


def score(loaded: LoadedModel, probes: list[Probe]) -> list[float]:
    scheduler = Scheduler(BlockPool(loaded.plan.num_pages, 32), token_budget=512, max_running=8)
    requests = [
        Request(str(i), probe.prompt + probe.answer[:-1], SamplingParams(logprobs=1), 1, given=probe.answer)
        for i, probe in enumerate(probes)
    ]
    for request in requests:
        scheduler.admit(request)
    while scheduler.has_work:
        plan = scheduler.plan()
        scheduler.commit(plan, loaded.runner.step(plan))
    return [sum(s.logprob or 0 for s in request.scores) / len(request.scores) for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_wrong_rotary_scale_trips_canaries_and_a_second_run_does_not(default_model_path: Path, kv_dtype: str) -> None:
    sound = load(default_model_path, 1, kv_dtype)
    probes = make_probes(open_checkpoint(default_model_path).load_tokenizer(), sound.config.vocab_size, 256)
    baseline = score(sound, probes)
    print([f"{probe.task} {probe.length}: {value:.3f}" for probe, value in zip(probes, baseline, strict=True)])  # noqa: T201
    assert score(sound, list(reversed(probes))) == list(reversed(baseline)), "to the last bit, in another order"
    wrong = score(load(default_model_path, 2, kv_dtype), probes)
    print([f"{value:.3f}" for value in wrong])  # noqa: T201
    assert all(after < before - ALERT for before, after in zip(baseline, wrong, strict=True))
