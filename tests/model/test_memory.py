"""The memory plan: arithmetic by hand, limits from a made-up /proc and /sys."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagestream.model.config import ModelConfig
from pagestream.model.errors import NotEnoughMemoryError
from pagestream.model.kv_cache import KVCache
from pagestream.model.memory import MemoryPlan, activation_bytes, available_memory, plan_memory
from pagestream.model.runner import Runner
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.weights import build_weights, expected_tensors

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position=2048,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
PARAMETERS = 1000 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64
KV_BYTES_PER_TOKEN_FP32 = 3 * 2 * 2 * 16 * 4


def plan(**changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "dtype": torch.float32,
        "bits": {},
        "kv_dtype": torch.float32,
        "page_size": 16,
        "max_context": 2048,
        "token_budget": 256,
        "kv_memory": None,
        "available": 1 << 30,
    }
    return plan_memory(CONFIG, **(arguments | changes))


def test_weights_and_pages_are_counted_to_the_byte() -> None:
    wide = plan()
    assert wide.weights_bytes == PARAMETERS * 4
    assert wide.kv_capacity_tokens == 16 * 2048
    assert wide.kv_bytes == wide.num_pages * 16 * KV_BYTES_PER_TOKEN_FP32
    narrow = plan(dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    assert narrow.weights_bytes * 2 == wide.weights_bytes
    assert narrow.kv_bytes * 2 == wide.kv_bytes
    assert narrow.num_pages == wide.num_pages


def test_the_default_pool_takes_half_of_what_is_left() -> None:
    base = PARAMETERS * 4 + activation_bytes(CONFIG, torch.float32, 256)
    tight = plan(available=base + 2_000_000)
    assert 1_000_000 - 16 * KV_BYTES_PER_TOKEN_FP32 < tight.kv_bytes <= 1_000_000


def test_the_pool_asked_for_is_the_pool_in_whole_pages() -> None:
    page = 16 * KV_BYTES_PER_TOKEN_FP32
    assert plan(kv_memory=5 * page + page // 2).num_pages == 5
    with pytest.raises(NotEnoughMemoryError, match=r"--kv-memory .* one page of 16 tokens"):
        plan(kv_memory=page - 1)


def test_a_pool_smaller_than_the_context_is_allowed_and_reported() -> None:
    small = plan(kv_memory=64 * 16 * KV_BYTES_PER_TOKEN_FP32)
    assert small.longest_request == 1024
    assert small.report()[-1] == "longest request: 1024 tokens, not 2048: the KV cache is the limit (--kv-memory)"
    assert plan().report()[-1] == "longest request: 2048 tokens"
    assert plan().report()[1] == "KV cache: 2048 pages of 16 tokens = 32768 tokens"


@pytest.mark.parametrize("changes", [{"available": 1 << 20}, {"kv_memory": 2 << 30}])
def test_too_little_memory_is_one_sentence_with_sizes_and_knobs(changes: dict[str, int]) -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(re.findall(r"\d+\.\d [MG]iB", message)) == 5
    for word in ("weights", "activations", "KV cache", "available", "--dtype", "--kv-memory", "--max-context"):
        assert word in message


@given(
    available=st.integers(0, 1 << 28),
    max_context=st.integers(1, 1 << 20),
    page_size=st.sampled_from([16, 32, 64, 128]),
    token_budget=st.integers(1, 4096),
    kv_memory=st.none() | st.integers(0, 1 << 28),
)
def test_a_plan_fits_or_is_refused(
    available: int, max_context: int, page_size: int, token_budget: int, kv_memory: int | None
) -> None:
    """And the default pool always serves a request of 512 tokens, or the longest there may be."""
    try:
        made = plan(
            available=available,
            max_context=max_context,
            page_size=page_size,
            token_budget=token_budget,
            kv_memory=kv_memory,
        )
    except NotEnoughMemoryError:
        return
    assert made.total_bytes <= available
    assert made.num_pages >= 1
    if kv_memory is None:
        assert made.kv_capacity_tokens >= min(max_context, 512)
        assert made.kv_capacity_tokens < 16 * max_context + page_size
    else:
        assert made.kv_bytes <= kv_memory


def test_the_estimate_covers_what_torch_allocates_in_a_step() -> None:
    """Without being a multiple of it. The profiler sees every tensor come and go."""
    config = replace(CONFIG, hidden_size=256, intermediate_size=1024, num_heads=4, num_kv_heads=2, head_dim=64)
    cpu, zeros = torch.device("cpu"), expected_tensors(config)
    weights = build_weights(config, lambda name: torch.zeros(zeros[name]), torch.float32, cpu)
    runner = Runner(config, weights, KVCache(config, 16, 16, torch.float32, cpu))
    chunk = Chunk("r", [0] * 256, 256, 0, 256, range(16), SamplingParams())
    runner.step(StepPlan((chunk,)))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        runner.step(StepPlan((chunk,)))
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    held = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert held < activation_bytes(config, torch.float32, 256) < 4 * held


def machine(root: Path, *, cgroup: str, files: dict[str, str]) -> Path:
    text = {"proc/meminfo": "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  800 kB\n", "proc/self/cgroup": cgroup}
    for name, content in (text | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("cgroup", "files", "kib"),
    [
        ("0::/\n", {}, 800),
        ("0::/pod\n", {f"{V2}/pod/memory.max": "max\n"}, 800),
        (
            "0::/pod/app\n",
            {
                f"{V2}/pod/app/memory.max": "max\n",
                f"{V2}/pod/memory.max": f"{500 * 1024}\n",
                f"{V2}/pod/memory.current": f"{300 * 1024}\n",
                f"{V2}/pod/memory.stat": f"anon 1\ninactive_file {50 * 1024}\n",
            },
            250,
        ),
        (
            "4:cpu:/x\n3:memory:/not/visible/here\n",
            {
                f"{V1}/memory.limit_in_bytes": f"{400 * 1024}\n",
                f"{V1}/memory.usage_in_bytes": f"{100 * 1024}\n",
                f"{V1}/memory.stat": f"total_inactive_file {20 * 1024}\n",
            },
            320,
        ),
        (
            "3:memory:/\n",
            {
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "4096\n",
                f"{V1}/memory.stat": "total_inactive_file 0\n",
            },
            800,
        ),
        (
            "0::/pod\n",
            {f"{V2}/pod/memory.max": "10\n", f"{V2}/pod/memory.current": "20\n", f"{V2}/pod/memory.stat": "anon 1\n"},
            0,
        ),
    ],
    ids=[
        "no limit file",
        "v2 unlimited",
        "v2 limit of a parent",
        "v1 in a container",
        "v1 unlimited",
        "over the limit",
    ],
)
def test_available_memory_is_the_tightest_limit(tmp_path: Path, cgroup: str, files: dict[str, str], kib: int) -> None:
    root = machine(tmp_path, cgroup=cgroup, files=files)
    assert available_memory(torch.device("cpu"), root) == kib * 1024


def test_available_memory_of_this_machine_is_plausible() -> None:
    assert 1 << 24 < available_memory(torch.device("cpu")) < 1 << 46
