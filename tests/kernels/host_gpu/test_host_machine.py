"""The host machine notices what it is there for: the attention kernel with one line broken must not pass."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

MUTANTS = {
    "nothing broken": ("attention.h", "", ""),
    "copies are not waited for": ("attention.h", "wait_copies<Shape::kStages - 2>();", ""),
    "a stage is refilled while others read it": ("attention.h", "if (wide) block_barrier(); else warp_barrier();", ""),
    "parts are merged before all are written": (
        "attention.h",
        "kPart, segment.kv_head);\n    block_barrier();",
        "kPart, 0);",
    ),
    "the counter is not ready for the next layer": ("attention.h", "if (*flag) *arrivals = 0;", ""),
    "slots beyond the sequence are read": (
        "kv_tile.h",
        "const bool valid = visible_.holds(key + row);",
        "bool valid = true;",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_noticed(host_gpu, helpers, tmp_path, name):
    folders = host_gpu.sources
    file, line, replacement = MUTANTS[name]
    csrc = shutil.copytree(folders.csrc, tmp_path / "csrc")
    source = (csrc / "cuda" / file).read_text()
    assert line in source
    (csrc / "cuda" / file).write_text(source.replace(line, replacement, 1) if line else source)
    # One instance is enough, and compiles in seconds.
    main = re.sub(r"case (80|96|128): .*\n", "", (folders.host / "main.cpp").read_text())
    main = re.sub(r"case DType::kFloat16: .*\n|default: a(ttend|ppend)<BFloat16, Float8>.*\n", "", main)
    (tmp_path / "main.cpp").write_text(main)
    program = tmp_path / "host_gpu"
    includes = (f"-I{folders.host}", f"-I{csrc}")
    sources = (folders.host / "machine.cpp", tmp_path / "main.cpp")
    command = (shutil.which("g++"), "-std=c++17", "-O1", "-w", *includes, *sources, "-o", program)
    subprocess.run(command, check=True)
    machine = type(host_gpu)(program, host_gpu.sources)
    batch = helpers.random_batch([(1, 700), (1, 65), (40, 300)], dtype=torch.bfloat16, heads=(4, 2))

    def attend():
        for seed in range(3):
            out, stats, masses = machine.attend(batch, stats=True, page_masses=True, num_blocks=5, seed=seed)
            helpers.check_against_oracle(batch, helpers.Result(out.float(), stats, masses))

    if name == "nothing broken":
        attend()
    else:
        with pytest.raises(AssertionError):
            attend()
