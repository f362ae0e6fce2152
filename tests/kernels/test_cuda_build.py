"""The CUDA half of the library, as far as a machine without a GPU can judge it. Compiles for every architecture (a few
minutes, once: the library is cached), so it needs nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagestream.kernels import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc"),
]
CSRC = Path(build.__file__).parent / "csrc"
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?\n.*?\n"
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
)
USE = """
import ctypes, sys, torch
from pagestream.kernels import append, build
ctypes.CDLL(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(has(f"pagestream::{name}", "CUDA") for name in sys.argv[2:]), torch.cuda.is_initialized())
ctypes.CDLL(sys.argv[1]).pagestream_select_isa(b"baseline")
query, cache, out = torch.ones(1, 2, 16), torch.ones(1, 1, 16, 16), torch.zeros(1, 2, 16)
tables, starts = torch.zeros(1, 1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
torch.ops.pagestream.paged_attention(query, cache, cache, tables, starts, starts[1:], 1.0, 0, out, None, None)
print(out.unique().tolist())
"""


def output_of(program: str, *arguments: str | Path) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build(with_cuda=True)


def test_no_kernel_spills_on_any_architecture(library):
    report = (library.parent / "build.log").read_text()
    entries = [(name, arch, *map(int, numbers)) for name, arch, *numbers in ENTRY.findall(report)]
    attention = [entry for entry in entries if "attention_kernel" in entry[0]]
    architectures = {f"sm_{arch}" for arch in build._CUDA_ARCHITECTURES}
    assert {arch for _, arch, *_ in entries} == architectures
    assert (
        len(attention) == len(architectures) * len(build._HEAD_SIZES) * 4 * 2
    )  # dtypes of query and cache, statistics
    assert [entry for entry in entries if any(entry[2:5])] == []


def test_registers_leave_room_for_three_blocks(library):
    """65,536 registers over three blocks of 128 threads, from sm_90 on: what the plan counts on."""
    for name, arch, *numbers in ENTRY.findall((library.parent / "build.log").read_text()):
        if "attention_kernel" in name and int(re.sub(r"\D", "", arch)) >= 90:
            assert int(numbers[-1]) * 128 * 3 <= 65536, (name, arch)


def test_loads_without_a_gpu_and_serves_the_cpu(library):
    names = ("paged_attention", "plan_attention", "append_kv")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", USE, library, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["True True True False", "[1.0]"], done.stderr


def test_needs_no_cuda_library(library):
    """Neither to link nor, except for the stream that is looked up by name, of torch."""
    symbols = output_of("nm", "-D", "--undefined-only", library)
    assert "aoti_torch" in symbols
    assert not re.search(r" U (cu[A-Z]|cuda|\S*get_current_cuda_stream)", symbols)


def machine_code(tmp_path: Path, name: str, csrc: Path) -> list[str]:
    """Of the attention kernels of head size 128 without statistics, for sm_90a: hex dumps of their ELF sections."""
    cubin = tmp_path / f"{name}.cubin"
    flags = ("-cubin", "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90a", "-DPAGESTREAM_HEAD_SIZE=128")
    source = csrc / "cuda" / "attention.cu"
    subprocess.run([build.nvcc(), *flags, f"-I{csrc / 'cuda' / 'device'}", source, "-o", cubin], check=True)

    headers = output_of("readelf", "-W", "-S", cubin)
    sections = re.findall(r"\[ *(\d+)\] \.text\.\S*attention_kernel\S*NoStatistics", headers)
    # The first line names the section, and the name of a function in an anonymous namespace depends on the file's path.
    return sorted(output_of("readelf", "-x", number, cubin).strip().split("\n", 1)[1] for number in sections)


def test_statistics_off_is_the_machine_code_of_a_build_without_them(tmp_path):
    """The other build has an empty statistics.h."""
    stripped = shutil.copytree(CSRC, tmp_path / "csrc")
    (stripped / "cuda" / "statistics.h").write_text(
        '#pragma once\n#include "softmax.h"\nnamespace pagestream::gpu {\nusing Statistics = NoStatistics;\n}\n'
    )
    full = machine_code(tmp_path, "full", CSRC)
    assert len(full) == 4  # bfloat16 and float16, each also with e4m3
    assert min(map(len, full)) > 10_000
    assert machine_code(tmp_path, "stripped", stripped) == full
