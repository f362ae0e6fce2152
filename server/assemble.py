"""Loads the model and puts the engine together around it; runs once, off the event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from pagestream.kernels import selftest
from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.default_model import resolve_model
from pagestream.model.errors import ModelError
from pagestream.model.loader import DTYPES, KV_DTYPES, LoadedModel, load_model
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.server.backpressure import ReaderLimits
from pagestream.server.block_pool import BlockPool
from pagestream.server.config import ServerConfig
from pagestream.server.costs import Footprint
from pagestream.server.engine import Engine
from pagestream.server.inbox import QueueLimits
from pagestream.server.job import Publication
from pagestream.server.metrics import Metrics
from pagestream.server.observer import Observer
from pagestream.server.pace import Pace
from pagestream.server.scheduler import Scheduler
from pagestream.server.served import ServedModel

log = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING = 64
_WARM_UP_ROWS = 16  # on a CPU: 512 take a third of a second


def assemble(
    config: ServerConfig, metrics: Metrics, publish: Callable[[Publication], None], on_fault: Callable[[], None]
) -> ServedModel:
    """A model that has generated its first token, with its engine running. Raises ModelError."""
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = resolve_model(config.model, config.cache_dir, log.info)
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.load_tokenizer()
    loaded = load_model(
        checkpoint,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        device=config.device,
        page_size=config.page_size,
        max_context=config.max_context,
        token_budget=config.token_budget,
        kv_memory=config.kv_memory,
        cache_dir=config.cache_dir,
        deterministic=config.deterministic,
        progress=_LoadProgress(),
    )
    if config.deterministic and not loaded.is_row_invariant:
        raise ModelError(
            f"--deterministic: in {loaded.dtype}, answers may depend on what is computed beside them; it takes int8 or "
            "int4, compiled kernels, and matrices whose inputs divide by 32"
        )
    _check_attention(loaded, config.page_size, metrics)
    _warm_up(loaded, config.token_budget)
    engine = _engine(config, loaded, metrics, publish, on_fault)
    engine.start()
    model = ServedModel(
        name=loaded.name,
        tokenizer=tokenizer,
        engine=engine,
        architecture=loaded.config.architecture,
        parameters=loaded.parameters,
        vocab_size=loaded.config.vocab_size,
        max_context=loaded.max_context,
        kv_capacity_tokens=loaded.plan.kv_capacity_tokens,
        page_size=config.page_size,
        device=loaded.device,
        dtype=loaded.dtype,
        kv_dtype=loaded.kv_dtype,
    )
    metrics.set_model(
        model.name,
        load_seconds=time.monotonic() - started,
        architecture=model.architecture,
        dtype=model.dtype,
        device=model.device,
        max_context=model.max_context,
        block_size=model.page_size,
        num_blocks=loaded.plan.num_pages,
        kv_dtype=model.kv_dtype,
    )
    return model


def _engine(
    config: ServerConfig,
    loaded: LoadedModel,
    metrics: Metrics,
    publish: Callable[[Publication], None],
    on_fault: Callable[[], None],
) -> Engine:
    max_running = config.max_running or min(DEFAULT_MAX_RUNNING, config.token_budget)
    pool = BlockPool(loaded.plan.num_pages, config.page_size, prefix_cache=config.prefix_cache)
    speculation = loaded.is_row_invariant if config.speculation is None else config.speculation
    scheduler = Scheduler(pool, token_budget=config.token_budget, max_running=max_running, speculation=speculation)
    limits = QueueLimits(config.max_queue_requests, config.max_queue_tokens)
    pace = Pace(target_gap=config.target_gap_ms / 1000)
    observer = Observer(metrics, config.attention_every, time.monotonic)
    readers = ReaderLimits(max_pause_seconds=config.slow_reader_seconds)
    footprint = Footprint(loaded.plan.weights_bytes, loaded.plan.kv_bytes // loaded.plan.kv_capacity_tokens)
    return Engine(
        pool, scheduler, loaded.runner, metrics, limits, readers, pace, observer, publish, on_fault, footprint=footprint
    )


def _check_attention(loaded: LoadedModel, page_size: int, metrics: Metrics) -> None:
    """Raises ModelError if the attention that will serve breaks one of its laws."""
    started = time.monotonic()
    checks = selftest.run(
        selftest.Setting(
            device=torch.device(loaded.device),
            dtype=DTYPES[loaded.dtype],
            kv_dtype=KV_DTYPES[loaded.kv_dtype],
            group=loaded.config.num_heads // loaded.config.num_kv_heads,
            head_size=loaded.config.head_dim,
            page_size=page_size,
        )
    )
    metrics.set_gauges(
        {
            "selftest_seconds": {(): time.monotonic() - started},
            "selftest_ok": {(check.test,): check.passed for check in checks},
            "selftest_max_error": {(check.test,): check.error for check in checks},
        }
    )
    failed = [f"{check.test} ({check.error:.3g} times the error allowed)" for check in checks if not check.passed]
    if failed:
        raise ModelError(f"attention on {loaded.device} computes wrong results: self-test {', '.join(failed)} failed")


def _warm_up(loaded: LoadedModel, token_budget: int) -> None:
    """Generates one token, so that what a step needs is had before it is promised: compiled kernels, threads, weights
    read from their file, and on a GPU, where it is not taken page by page, the memory of the largest step there can be.
    """
    rows = _WARM_UP_ROWS if loaded.device == "cpu" else token_budget
    length = min(rows, token_budget, loaded.plan.longest_request - 1)
    chunk = Chunk(
        request_id="warm-up",
        tokens=[0] * length,
        num_prompt_tokens=length,
        start=0,
        length=length,
        block_ids=range(loaded.plan.num_pages),
        sampling=SamplingParams(),
    )
    loaded.runner.step(StepPlan((chunk,)))


class _LoadProgress:
    """Logs every quarter of the weights."""

    def __init__(self) -> None:
        self._next_quarter = 1

    def __call__(self, stored: int, total: int) -> None:
        if stored * 4 >= total * self._next_quarter:
            log.info("weights: %d %% loaded", 100 * stored // total)
            self._next_quarter = 4 * stored // total + 1
