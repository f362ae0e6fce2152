"""Runs one step: plan to batch, batch to logits, logits to tokens. Owns every tensor and decides nothing."""

from __future__ import annotations

from itertools import islice

from pagestream.model.attention import build_observation, summarize
from pagestream.model.batch import Batch, build_batch
from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache
from pagestream.model.network import Network
from pagestream.model.sampling import sample
from pagestream.model.step import StepPlan, StepResult
from pagestream.model.weights import Weights


class Runner:
    """Knows no requests: all it keeps between steps is the pages. Any chunk may be run again, alone or in another
    batch, as long as what precedes it is in the cache.
    """

    def __init__(self, config: ModelConfig, weights: Weights, cache: KVCache, *, deterministic: bool = False) -> None:
        self._config = config
        self._network = Network(config, weights, deterministic=deterministic)
        self._cache = cache
        self._device = weights.norm.device
        self._batch: Batch | None = None  # the last, whose tensors the next may have

    @property
    def is_row_invariant(self) -> bool:
        """See `Network.is_row_invariant`."""
        return self._network.is_row_invariant

    def step(self, plan: StepPlan) -> StepResult:
        """Raises NonFiniteLogitsError, naming the request, where the network returns no usable distribution."""
        self._copy_pages(plan)
        batch = self._batch = build_batch(plan, self._cache.page_size, self._device, self._batch)
        observation = build_observation(plan, self._config, batch.block_tables.shape[1])
        outputs = self._network.outputs(batch, self._cache, observation)
        tokens = iter(sample(outputs, plan.chunks))
        return StepResult(
            sampled=tuple(tuple(islice(tokens, len(chunk.sampled_positions))) for chunk in plan.chunks),
            attention=() if observation is None else summarize(plan, observation, self._config, self._cache.page_size),
            seconds=outputs.seconds,
        )

    def _copy_pages(self, plan: StepPlan) -> None:
        page_size = self._cache.page_size
        copies = [
            (chunk.copy_from, chunk.block_ids[chunk.start // page_size])
            for chunk in plan.chunks
            if chunk.copy_from is not None
        ]
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._cache.copy_pages(sources, targets)
