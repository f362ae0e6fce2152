"""Compiles and loads the CPU kernels: g++ called directly, into the user's cache folder, at first use or by
`python -m pagestream.kernels.build`. The only place that reads the environment:

PAGESTREAM_CPU_ISA: auto (default), vnni, avx512, avx2, baseline, or reference (no C++ at all).
CXX: the compiler, g++ by default. XDG_CACHE_HOME: where built libraries live.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
_LIBRARY = "libpagestream_cpu.so"
_TORCH_TARGET = (
    "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11: loads in it and in all later ones
)
# No fast-math: statistics need NaN, infinity and the order of operations. No automatic fusing: see vec.h.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_VNNI = (*_AVX512, "-mavx512vnni")
# Flags of every build of a source. What an instruction set runs is the best of them: kernels_named in bindings.cpp.
_Builds = Mapping[str, Mapping[str, tuple[str, ...]]]
_X86_BUILDS: _Builds = {
    "attention": {"avx512": _AVX512, "avx2": _AVX2, "baseline": ("-msse4.2",)},
    "linear": {"vnni": _VNNI, "avx2": _AVX2, "baseline": ("-msse4.2",)},
}
_OTHER_BUILDS: _Builds = {"attention": {"baseline": ()}, "linear": {"baseline": ()}}


class BuildError(RuntimeError):
    """The CPU kernels could not be compiled; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Status:
    """What serves CPU tensors in this process."""

    implementation: str  # "cpp" or "reference"
    isa: str  # one of _isas(); "none" for the reference
    detail: str  # path of the library, or why there is none


def _is_x86() -> bool:
    return platform.machine() == "x86_64"


def _builds() -> _Builds:
    return _X86_BUILDS if _is_x86() else _OTHER_BUILDS


def _isas() -> tuple[str, ...]:
    """Best first; each has what the next one has."""
    return ("vnni", "avx512", "avx2", "baseline") if _is_x86() else ("baseline",)


def build() -> Path:
    """The library, compiled if the cache folder does not hold it. Raises BuildError."""
    compiler = os.environ.get("CXX", "g++")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagestream" / "kernels"
        target = cache / _fingerprint(compiler)
        if not (target / _LIBRARY).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-", ignore_cleanup_errors=True) as aside:
                _compile(compiler, Path(aside))
                with contextlib.suppress(OSError):  # another process was first: its library is the same
                    Path(aside).rename(target)
    except FileNotFoundError as error:
        raise BuildError(f"no C++ compiler ({compiler}): install g++ 11 or later (`apt-get install g++`)") from error
    except OSError as error:
        raise BuildError(f"{error}: set XDG_CACHE_HOME to a folder that can be written") from error
    return target / _LIBRARY


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout  # noqa: S603  # the user's own CXX
    digest = hashlib.sha256(repr((version, _FLAGS, _builds(), _TORCH_TARGET)).encode())
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, folder: Path) -> None:
    sys.stderr.write("pagestream: compiling the CPU kernels (once, a few seconds) ... ")
    sys.stderr.flush()
    started = time.monotonic()
    torch_folder = Path(torch.__file__).parent
    commands = {
        f"{name}_{isa}.o": [
            *flags,
            f"-DPAGESTREAM_ISA=pagestream_{name}_{isa}",
            "-c",
            str(_SOURCES / f"{name}.cpp"),
        ]
        for name, builds in _builds().items()
        for isa, flags in builds.items()
    }
    commands["bindings.o"] = [
        _TORCH_TARGET,
        "-isystem",
        str(torch_folder / "include"),
        "-c",
        str(_SOURCES / "bindings.cpp"),
    ]
    _run_all([[compiler, *_FLAGS, *arguments, "-o", str(folder / name)] for name, arguments in commands.items()])
    objects = [str(folder / name) for name in commands]
    _run_all(
        [[compiler, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(folder / _LIBRARY)]]
    )
    sys.stderr.write(f"{time.monotonic() - started:.1f} s\n")


def _run_all(commands: list[list[str]]) -> None:
    """Run the commands at the same time."""
    pipe, text = subprocess.PIPE, subprocess.STDOUT
    processes = [subprocess.Popen(command, stdout=pipe, stderr=text, text=True) for command in commands]  # noqa: S603
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            raise BuildError(f"the C++ compiler failed: {output.strip()[:2000]}")


@functools.cache
def load() -> Status:
    """Make the operators ready for CPU tensors, once per process: C++, or with one warning the reference."""
    wanted = os.environ.get("PAGESTREAM_CPU_ISA", "auto")
    choices = ("auto", "reference", *_isas())
    if wanted not in choices:
        raise ValueError(f"PAGESTREAM_CPU_ISA is {wanted!r}; it must be one of {', '.join(choices)}")
    if wanted == "reference":
        return Status("reference", "none", "PAGESTREAM_CPU_ISA=reference")
    try:
        path = str(build())
        ctypes.CDLL(path)  # registers its operators with torch
    except (BuildError, OSError) as error:
        warnings.warn(f"pagestream runs its slow reference kernels on this CPU: {error}", RuntimeWarning, stacklevel=3)
        return Status("reference", "none", str(error))
    for isa in _isas() if wanted == "auto" else (wanted,):
        if _select(path, isa):
            return Status("cpp", isa, path)
    raise ValueError(f"PAGESTREAM_CPU_ISA is {wanted!r}, which this CPU does not have")


def _select(path: str, isa: str) -> bool:
    return bool(ctypes.CDLL(path).pagestream_select_isa(isa.encode()))


@contextlib.contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """For tests and benchmarks: run the CPU kernels of `isa` inside. Raises ValueError if this machine cannot."""
    status = load()
    if status.implementation != "cpp" or not _select(status.detail, isa):
        raise ValueError(f"no {isa} kernels here")
    try:
        yield
    finally:
        _select(status.detail, status.isa)


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
