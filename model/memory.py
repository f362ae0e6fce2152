"""How much memory a model will take, worked out before any of it is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import torch

from pagestream.model.config import ModelConfig
from pagestream.model.errors import NotEnoughMemoryError
from pagestream.model.kv_cache import bytes_per_token
from pagestream.model.quantization import Bits
from pagestream.model.weights import expected_tensors, weight_bytes

_POOL_CONTEXTS: Final = 16  # the pool wanted by default, in longest requests
_LEAST_TOKENS: Final = 512  # what the default pool must hold, unless the longest request is shorter
_SAMPLED_ROWS: Final = 64  # requests assumed to choose a token in one step
_BYTES_PER_LOGIT: Final = 32  # logits, adjusted and sorted copies, order and running sums, while they are sampled from


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes and pages. Made by `plan_memory`, so it fits."""

    weights_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_pages: int
    page_size: int  # tokens
    max_context: int  # tokens; the longest request asked for
    available_bytes: int

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.kv_bytes

    @property
    def longest_request(self) -> int:
        """Tokens of the longest request that can ever be served, prompt and answer."""
        return min(self.max_context, self.kv_capacity_tokens)

    def report(self) -> tuple[str, ...]:
        """Lines for people."""
        longest = f"longest request: {self.longest_request} tokens"
        if self.longest_request < self.max_context:
            longest += f", not {self.max_context}: the KV cache is the limit (--kv-memory)"
        total = f"memory: {_size(self.total_bytes)} of {_size(self.available_bytes)} available: "
        total += f"weights {_size(self.weights_bytes)}, activations {_size(self.activation_bytes)}, "
        total += f"KV cache {_size(self.kv_bytes)}"
        pool = f"KV cache: {self.num_pages} pages of {self.page_size} tokens = {self.kv_capacity_tokens} tokens"
        return total, pool, longest


def plan_memory(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    bits: Mapping[str, Bits],
    kv_dtype: torch.dtype,
    page_size: int,
    max_context: int,
    token_budget: int,
    kv_memory: int | None,
    available: int,
) -> MemoryPlan:
    """`bits` of the matrices that stay quantised; `max_context`, `page_size` and `token_budget` in tokens, `kv_memory`
    and `available` in bytes.

    Without `kv_memory` the pool holds 16 requests of `max_context` or takes half of what weights and activations
    leave, whichever is less. Raises NotEnoughMemoryError where the plan does not fit `available`, or the pool not
    one page.
    """
    weights = weight_bytes(config, dtype, bits)
    activations = activation_bytes(config, dtype, token_budget)
    page_bytes = page_size * bytes_per_token(config, kv_dtype)
    if kv_memory is None:
        free = available - weights - activations
        least = math.ceil(min(max_context, _LEAST_TOKENS) / page_size)
        wanted = math.ceil(_POOL_CONTEXTS * max_context / page_size)
        num_pages = max(least, min(wanted, free // 2 // page_bytes))
    else:
        num_pages = kv_memory // page_bytes
    if num_pages < 1:
        raise NotEnoughMemoryError(
            f"--kv-memory {_size(kv_memory or 0)} does not hold one page of {page_size} tokens, "
            f"which takes {_size(page_bytes)}"
        )
    plan = MemoryPlan(
        weights_bytes=weights,
        activation_bytes=activations,
        kv_bytes=num_pages * page_bytes,
        num_pages=num_pages,
        page_size=page_size,
        max_context=max_context,
        available_bytes=available,
    )
    if plan.total_bytes > available:
        raise NotEnoughMemoryError(
            f"the model needs {_size(weights)} for weights, {_size(activations)} for activations and "
            f"{_size(plan.kv_bytes)} for the KV cache, {_size(plan.total_bytes)} in all, but {_size(available)} are "
            "available: choose a smaller --dtype, --kv-memory or --max-context"
        )
    return plan


def activation_bytes(config: ModelConfig, dtype: torch.dtype, token_budget: int) -> int:
    """An estimate of what comes and goes: the larger of one step and of loading.

    A step of `token_budget` rows holds at once, per row, at most four hidden states, projected heads twice (three
    more in fp32 while they are rotated), the attention output and four MLP intermediates; and the logits of 64
    sampled rows. Loading holds the largest tensor once in fp32.
    """
    query_key = (config.num_heads + config.num_kv_heads) * config.head_dim
    value = config.num_kv_heads * config.head_dim
    elements = 4 * config.hidden_size + 3 * (query_key + value) + 4 * config.intermediate_size
    step = token_budget * (elements * dtype.itemsize + 3 * query_key * torch.float32.itemsize)
    sampling = min(token_budget, _SAMPLED_ROWS) * config.vocab_size * _BYTES_PER_LOGIT
    largest = max(math.prod(shape) for shape in expected_tensors(config).values())
    return max(step + sampling, largest * torch.float32.itemsize)


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be allocated: on a GPU what the driver says; on a CPU the least of the machine's available
    memory and what every memory cgroup of this process, version 1 or 2, leaves. `root` holds proc and sys.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    machine = int(meminfo["MemAvailable"].removesuffix("kB")) * 1024
    return max(0, min((machine, *_cgroup_headrooms(root))))


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Limit minus usage of each limited cgroup from this process's up to the top. File pages that nobody used lately
    count as usage there, but are given back on demand.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, reclaimable = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            folder = root / base / group
            if not (folder / limit).exists() or (text := (folder / limit).read_text().strip()) == "max":
                continue  # the top has no limit file; a container may not see its own path
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(text) - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
