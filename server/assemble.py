"""Loads the model and puts the engine together around it; runs once, off the event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from pagestream.model.default_model import resolve_model
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.tokenizer import load_tokenizer
from pagestream.server.block_pool import BlockPool
from pagestream.server.config import ServerConfig
from pagestream.server.engine import Engine, QueueLimits
from pagestream.server.events import Publication
from pagestream.server.metrics import Metrics
from pagestream.server.scheduler import Scheduler
from pagestream.server.served import ServedModel

log = logging.getLogger(__name__)


def assemble(config: ServerConfig, metrics: Metrics, publish: Callable[[Publication], None]) -> ServedModel:
    """A model that has generated its first token, with its engine running. Raises ModelError."""
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = resolve_model(config.model, config.cache_dir)
    tokenizer = load_tokenizer(path)
    loaded = load_model(
        path,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        device=config.device,
        page_size=config.page_size,
        max_context=config.max_context,
        token_budget=config.token_budget,
        kv_memory=config.kv_memory,
    )
    for line in loaded.plan.report():
        log.info(line)
    _warm_up(loaded, config.token_budget)
    pool = BlockPool(loaded.plan.num_pages, config.page_size)
    scheduler = Scheduler(pool, token_budget=config.token_budget, max_running=config.max_running)
    limits = QueueLimits(config.max_queue_requests, config.max_queue_tokens)
    engine = Engine(scheduler, loaded.runner, metrics, limits, publish)
    engine.start()
    metrics.set_model_loaded(loaded, time.monotonic() - started)
    return ServedModel(
        name=loaded.name,
        tokenizer=tokenizer,
        engine=engine,
        architecture=loaded.config.architecture,
        parameters=loaded.parameters,
        max_context=loaded.max_context,
        kv_capacity_tokens=loaded.plan.kv_capacity_tokens,
        page_size=config.page_size,
        device=loaded.device,
        dtype=loaded.dtype,
        kv_dtype=loaded.kv_dtype,
    )


def _warm_up(loaded: LoadedModel, token_budget: int) -> None:
    """Generates one token after the largest step there can be, so that what a step needs is had before it is promised:
    memory, compiled kernels, threads."""
    length = min(token_budget, loaded.max_context - 1, loaded.plan.kv_capacity_tokens - 1)
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
