"""Building, choosing and falling back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagestream.kernels import build

PROGRAM = """
import warnings, torch
from pagestream.kernels import build, paged_attention
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        query = out = torch.ones(1, 2, 16)
        cache = torch.ones(1, 1, 16, 16)
        tables, starts = torch.zeros(1, 1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        paged_attention(query, cache, cache, tables, starts, starts[1:], scale=1.0, out=out)
status, messages = build.load(), [str(warning.message) for warning in caught]
print(status.implementation, status.isa, len(messages), *messages, out.unique().tolist())
"""


def run_program(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_reference_serves_after_one_warning(tmp_path):
    done = run_program(tmp_path, CXX="no-such-compiler")
    assert done.stdout.startswith("reference none 1 "), done.stderr
    assert "slow reference kernels" in done.stdout
    assert "install g++" in done.stdout
    assert done.stdout.rstrip().endswith("[1.0]")


def test_a_failing_compiler_is_quoted(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run_program(tmp_path, CXX=str(compiler))
    assert done.stdout.startswith("reference none 1 "), done.stderr
    assert "out of cheese" in done.stdout
    assert list((tmp_path / "pagestream" / "kernels").iterdir()) == []


def test_the_environment_chooses_the_instruction_set(tmp_path):
    assert run_program(tmp_path, PAGESTREAM_CPU_ISA="reference").stdout.startswith("reference none 0 ")
    refused = run_program(tmp_path, PAGESTREAM_CPU_ISA="mmx")
    assert "PAGESTREAM_CPU_ISA is 'mmx'; it must be one of" in refused.stderr


@pytest.fixture
def library() -> Path:
    status = build.load()
    if status.implementation != "cpp":
        pytest.skip(status.detail)
    return Path(status.detail)


def test_a_second_build_finds_the_first(library, capsys):
    assert build.build() == library
    assert capsys.readouterr().err == ""


def test_a_library_that_is_named_needs_no_compiler_and_no_cache(library, tmp_path):
    """What a container image does, on any CPU: every instruction set is in the one file."""
    for isa in ("auto", "baseline"):
        named = {"PAGESTREAM_KERNELS": str(library), "PAGESTREAM_CPU_ISA": isa, "CXX": "no-such-compiler"}
        done = run_program(tmp_path, **named)
        expected = build.load().isa if isa == "auto" else isa
        assert done.stdout == f"cpp {expected} 0 [1.0]\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def symbols_of(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) as `nm` prints them."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm (binutils)")
    listing = subprocess.run([nm, *options, path], capture_output=True, text=True, check=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listing.splitlines()]


def test_objects_for_different_instruction_sets_share_no_symbol(library):
    """A weak symbol built with AVX-512 could be the one the linker keeps for everybody."""
    isas = ("vnni", "avx512", "avx2", "baseline")
    kernels = [path for path in library.parent.glob("*.o") if path.stem.endswith(isas)]
    assert len(kernels) >= len(isas)
    for path in kernels:
        exported = [name for kind, name in symbols_of(path, "--defined-only") if not kind.islower()]
        weak = [name for kind, name in symbols_of(path) if kind in "vVwW"]
        assert exported == [f"pagestream_{path.stem}"]
        assert weak == []


def test_library_needs_only_the_stable_interface_of_torch(library):
    needed = [name for _, name in symbols_of(library, "-D", "--undefined-only")]
    assert [name for name in needed if name.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))] == []
    assert any(name.startswith("aoti_torch_") for name in needed)


STREAM = """
#include "torch_stream.h"
extern "C" int32_t stream_of_device_3() {
  void* stream = nullptr;
  return get_current_stream(3, &stream) ? static_cast<int32_t>(reinterpret_cast<int64_t>(stream)) : -1;
}
"""
TORCH_CUDA = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(1000L + device);
  return 0;
}
"""
ASK = "import ctypes, sys; *_, user = [ctypes.CDLL(path) for path in sys.argv[1:]]; print(user.stream_of_device_3())"


def test_finds_the_stream_in_a_library_that_is_loaded_privately(tmp_path):
    """As Python loads torch's CUDA library, for which another of its name stands in here."""
    paths = [tmp_path / "libtorch_cuda.so", tmp_path / "user.so"]
    for path, source in zip(paths, (TORCH_CUDA, STREAM), strict=True):
        source_path = path.with_suffix(".cpp")
        source_path.write_text(source)
        options = ("-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{build._SOURCES}")
        subprocess.run([build.compiler(), *options, source_path, "-o", path], check=True)

    def asked(*libraries: Path) -> str:
        command = [sys.executable, "-c", ASK, *libraries]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert asked(*paths) == "1003"
    assert asked(paths[1]) == "-1"
