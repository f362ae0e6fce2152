"""The check at the start: passes with every kernel there is, catches each kind of broken one, and is quick."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pagestream.kernels import append_kv, build, operators, selftest

CPU = torch.device("cpu")
SERVED = (  # dtypes of queries and pages, page size, head size, query heads of a KV head
    (torch.float32, torch.float32, 16, 80, 1),
    (torch.float32, torch.bfloat16, 32, 64, 3),
    (torch.float32, torch.int8, 128, 64, 4),
    (torch.bfloat16, torch.bfloat16, 64, 128, 8),
)


def setting(**options: Any) -> selftest.Setting:
    defaults: dict[str, Any] = {
        "device": CPU,
        "dtype": torch.float32,
        "kv_dtype": torch.bfloat16,
        "group": 3,
        "head_size": 64,
        "page_size": 32,
    }
    return selftest.Setting(**defaults | options)


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
def test_every_kernel_passes(isa: str) -> None:
    try:
        with build.forced_isa(isa):
            for dtype, kv_dtype, page_size, head_size, group in SERVED:
                options = {"dtype": dtype, "kv_dtype": kv_dtype, "page_size": page_size}
                checks = selftest.run(setting(**options, head_size=head_size, group=group))
                assert [check.test for check in checks] == list(selftest.TESTS)
                assert all(check.passed for check in checks), (isa, options, checks)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_the_cuda_kernels_pass() -> None:
    for page_size in (16, 32, 64, 128):
        options = {"dtype": torch.bfloat16, "page_size": page_size, "device": torch.device("cuda")}
        assert all(check.passed for check in selftest.run(setting(**options)))


def forget_the_last_key(arguments: dict[str, Any]) -> None:
    arguments["context_lengths"] = arguments["context_lengths"] - 1


def sharpen(arguments: dict[str, Any]) -> None:
    arguments["scale"] *= 1.1


def swap_two_pages(arguments: dict[str, Any]) -> None:
    """Where there is a third: then the second is full."""
    tables = arguments["block_tables"] = arguments["block_tables"].clone()
    if tables.shape[1] > 2:
        tables[:, 1] = tables[:, 2]


def mix_up_heads(arguments: dict[str, Any]) -> None:
    arguments["query"] = arguments["query"].roll(1, dims=1)


def damage(
    index: object, change: Callable[[torch.Tensor], torch.Tensor], name: str
) -> Callable[[dict[str, Any]], None]:
    def after(arguments: dict[str, Any]) -> None:
        arguments[name][index] = change(arguments[name][index])  # type: ignore[index]

    return after


@pytest.mark.parametrize(
    ("before", "caught_by"),
    [
        (forget_the_last_key, {"T1"}),
        (sharpen, {"T1", "T13"}),
        (swap_two_pages, {"T1", "T19"}),
        (mix_up_heads, {"T1"}),
    ],
)
def test_a_kernel_that_reads_wrongly_is_caught(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[dict[str, Any]], None], caught_by: set[str]
) -> None:
    assert caught_by <= failed_with(monkeypatch, before=before)


@pytest.mark.parametrize(
    ("after", "caught_by"),
    [
        (damage(..., lambda out: out * 1.02, "out"), {"T1", "T7"}),
        (damage((0, 0, 0), lambda _: torch.tensor(torch.nan), "out"), {"T1", "T7"}),
        (damage((..., 0), lambda lse: lse + 0.1 * torch.rand_like(lse), "stats"), {"T19"}),
        (damage((..., 1), lambda entropy: entropy - 0.1, "stats"), {"T13"}),
    ],
)
def test_a_kernel_that_writes_wrongly_is_caught(
    monkeypatch: pytest.MonkeyPatch, after: Callable[[dict[str, Any]], None], caught_by: set[str]
) -> None:
    assert caught_by <= failed_with(monkeypatch, after=after)


def test_a_store_that_leaves_a_row_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def store(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *caches: torch.Tensor, **scales: Any) -> None:
        *caches, slots = caches
        append_kv(heads[:-1], cos[:-1], sin[:-1], *caches, slots[:-1], **scales)

    monkeypatch.setattr(selftest, "append_kv", store)
    assert "T1" in {check.test for check in selftest.run(setting()) if not check.passed}


def test_the_check_takes_little_memory() -> None:
    """In a process of its own: what malloc has had once, no later peak shows."""
    script = """
import re, torch
from pagestream.kernels import build, selftest
build.load()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
selftest.run(selftest.Setting(torch.device("cpu"), torch.float32, torch.int8, 3, 64, 32))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 * 1024  # kB; a third of it libraries' code. All of the keys in float64 took 60 MB


def failed_with(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[dict[str, Any]], None] = lambda _: None,
    after: Callable[[dict[str, Any]], None] = lambda _: None,
) -> set[str]:
    """The tests that fail with a kernel whose arguments or results somebody tampers with."""
    names = ("query", "key_cache", "value_cache", "block_tables", "query_starts", "context_lengths")

    def broken(*tensors: torch.Tensor, **options: Any) -> None:
        arguments = {**dict(zip(names, tensors, strict=True)), **options}
        before(arguments)
        operators.paged_attention(**arguments)
        after(arguments)

    monkeypatch.setattr(selftest, "paged_attention", broken)
    return {check.test for check in selftest.run(setting()) if not check.passed}
