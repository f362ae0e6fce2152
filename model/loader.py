"""From a path to a runner: open, check, plan, and only then allocate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from pagestream.model.checkpoint import check_tensors, open_checkpoint
from pagestream.model.config import ModelConfig
from pagestream.model.errors import ModelError
from pagestream.model.kv_cache import KVCache
from pagestream.model.memory import MemoryPlan, available_memory, plan_memory
from pagestream.model.runner import Runner
from pagestream.model.weights import build_weights, count_parameters

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    config: ModelConfig
    runner: Runner
    memory: MemoryPlan
    num_parameters: int
    dtype: str  # of the weights and the arithmetic; a key of DTYPES
    kv_dtype: str
    device: torch.device


def load_model(
    path: Path,
    *,
    dtype: str,
    kv_dtype: str,
    device: torch.device,
    page_size: int,
    max_context: int | None,
    token_budget: int,
    kv_memory: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """`dtype` and `kv_dtype` are keys of DTYPES or `auto`; `max_context` in tokens (None: the model's own),
    `kv_memory` in bytes (None: see `plan_memory`). `progress` gets bytes of weights stored and bytes in all.

    Raises ModelError; nothing is allocated before config, tensors and memory have been found good.
    """
    dtype = _choose_dtype(device) if dtype == "auto" else dtype
    kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
    for option, value in (("--dtype", dtype), ("--kv-dtype", kv_dtype)):
        if value not in DTYPES:
            raise ModelError(f"{option} {value} is not supported, only auto, {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    config = checkpoint.config
    plan = plan_memory(
        config,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype],
        page_size=page_size,
        max_context=min(max_context or config.max_position, config.max_position),
        token_budget=token_budget,
        kv_memory=kv_memory,
        available=available_memory(device),
    )
    num_parameters = count_parameters(config)
    _log.info("%s: %.1f M parameters, %s on %s", checkpoint.name, num_parameters / 1e6, dtype, device)
    for line in plan.report().splitlines():
        _log.info("%s", line)

    stored = 0

    def on_stored(num_bytes: int) -> None:
        nonlocal stored
        stored += num_bytes
        if progress is not None:
            progress(stored, plan.weights_bytes)

    weights = build_weights(config, checkpoint.read, DTYPES[dtype], device, on_stored)
    cache = KVCache(config, plan.num_pages, page_size, DTYPES[kv_dtype], device)
    return LoadedModel(
        name=checkpoint.name,
        config=config,
        runner=Runner(config, weights, cache),
        memory=plan,
        num_parameters=num_parameters,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )


def _choose_dtype(device: torch.device) -> str:
    """bf16 where the machine computes in it; elsewhere it would be emulated, slower than fp32 and less exact."""
    native = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    return "bf16" if device.type == "cuda" or native else "fp32"
