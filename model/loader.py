"""From a checkpoint to a runner: check, plan, and only then allocate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from pagestream.kernels import build
from pagestream.model.checkpoint import Checkpoint, check_tensors
from pagestream.model.config import ModelConfig
from pagestream.model.errors import ModelError
from pagestream.model.kv_cache import KVCache
from pagestream.model.memory import MemoryPlan, available_memory, plan_memory
from pagestream.model.packed import PackedMatrices
from pagestream.model.quantization import Bits, Groups, choose_bits, quantize
from pagestream.model.runner import Runner
from pagestream.model.weights import build_weights, count_parameters, expected_tensors

_QUANTIZED: Final[dict[str, Bits]] = {"int8": 8, "int4": 4}
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16} | dict.fromkeys(
    _QUANTIZED, torch.float32
)  # of arithmetic
KV_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    config: ModelConfig
    runner: Runner
    plan: MemoryPlan
    parameters: int
    device: str  # a torch device
    dtype: str  # a key of DTYPES
    kv_dtype: str  # a key of KV_DTYPES

    @property
    def max_context(self) -> int:
        """Tokens of one request that the model allows; the KV cache may hold less (`plan.longest_request`)."""
        return self.plan.max_context

    @property
    def is_row_invariant(self) -> bool:
        """See `Network.is_row_invariant`."""
        return self.runner.is_row_invariant


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    kv_dtype: str,
    device: str,
    page_size: int,
    max_context: int | None,
    token_budget: int,
    kv_memory: int | None,
    cache_dir: Path | None = None,
    deterministic: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """`device`, `dtype` and `kv_dtype` may be `auto`; `max_context` in tokens (None: the model's own), `kv_memory`
    in bytes (None: see `plan_memory`). `cache_dir` is where packed weights are kept for the next start (None: nowhere).
    `deterministic`: a token's bits may not depend on whether it is read or was generated. `progress` gets
    bytes of weights stored so far and bytes in all.

    Raises ModelError; nothing is allocated before config, tensors and memory have been found good, and the memory
    plan is logged before it is carried out.
    """
    place = _choose_device(device)
    _check_option("--dtype", dtype, DTYPES)
    _check_option("--kv-dtype", kv_dtype, KV_DTYPES)
    check_tensors(checkpoint)
    if dtype == "auto":
        dtype = _choose_dtype(place, checkpoint)
    if kv_dtype == "auto":
        kv_dtype = "int8" if dtype in _QUANTIZED else dtype
    if kv_dtype == "int8" and place.type != "cpu":
        raise ModelError("--kv-dtype int8 needs --device cpu")
    config = checkpoint.config
    bits = _choose_bits(checkpoint, dtype, place)
    plan = plan_memory(
        config,
        dtype=DTYPES[dtype],
        bits=bits,
        kv_dtype=KV_DTYPES[kv_dtype],
        page_size=page_size,
        max_context=min(max_context or config.max_position, config.max_position),
        token_budget=token_budget,
        kv_memory=kv_memory,
        available=available_memory(place),
    )
    parameters = count_parameters(config)
    _log.info("%s: %.1f M parameters, %s on %s", checkpoint.name, parameters / 1e6, dtype, place)
    for line in plan.report():
        _log.info("%s", line)
    packed_dir = None if cache_dir is None else cache_dir / "packed"
    quantized = PackedMatrices(bits, partial(_read_groups, checkpoint, bits), checkpoint.files, packed_dir)
    weights = build_weights(
        config,
        checkpoint.read,
        DTYPES[dtype],
        place,
        _running_total(progress, plan.weights_bytes),
        quantized,
    )
    quantized.keep()
    cache = KVCache(config, plan.num_pages, page_size, KV_DTYPES[kv_dtype], place)
    runner = Runner(config, weights, cache, deterministic=deterministic)
    return LoadedModel(checkpoint.name, config, runner, plan, parameters, str(place), dtype, kv_dtype)


def _choose_bits(checkpoint: Checkpoint, dtype: str, device: torch.device) -> dict[str, Bits]:
    if dtype not in _QUANTIZED:
        return {}
    if device.type != "cpu":
        raise ModelError(f"--dtype {dtype} needs --device cpu")
    return choose_bits(expected_tensors(checkpoint.config), _QUANTIZED[dtype], checkpoint.group_bits)


def _read_groups(checkpoint: Checkpoint, bits: Mapping[str, Bits], name: str) -> Groups:
    if name in checkpoint.group_bits:
        return checkpoint.read_groups(name)
    return quantize(checkpoint.read(name), bits[name])


def _running_total(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    stored = 0

    def on_stored(num_bytes: int) -> None:
        nonlocal stored
        stored += num_bytes
        progress(stored, total)

    return on_stored


def _check_option(option: str, value: str, choices: Mapping[str, torch.dtype]) -> None:
    if value != "auto" and value not in choices:
        raise ModelError(f"{option} {value} is not supported, only auto, {', '.join(choices)}")


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device")
    return torch.device(device)


def _choose_dtype(device: torch.device, checkpoint: Checkpoint) -> str:
    """On a CPU, a file that holds all its matrices in groups stays as it is: nothing is rounded once more, and no other
    arithmetic is as fast. Else bf16 where the machine computes in it; elsewhere it would be emulated, slower than fp32
    and less exact.
    """
    if device.type == "cuda":
        return "bf16"
    matrices = choose_bits(expected_tensors(checkpoint.config), 4, {}).keys()
    if matrices and matrices <= checkpoint.group_bits.keys() and build.load().implementation != "reference":
        return "int4" if 4 in checkpoint.group_bits.values() else "int8"
    native = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    return "bf16" if native else "fp32"
