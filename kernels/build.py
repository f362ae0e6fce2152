"""Compiles and loads the kernels: g++ and nvcc called directly, into the user's cache folder, at first use or by
`python -m pagestream.kernels.build`. One library: it holds the CUDA kernels too where there is a CUDA device and nvcc,
or with `--cuda`, and then still loads on a machine without either. The only place that reads the environment:

PAGESTREAM_CPU_ISA: auto (default), amx, vnni, avx512, avx2, baseline, or reference (no C++ and no CUDA at all).
CXX: the compiler, g++ by default. XDG_CACHE_HOME: where built libraries live.
PAGESTREAM_KERNELS: a library that was built before, to be loaded as it is; then no compiler is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
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
_LIBRARY = "libpagestream.so"
_LOG = "build.log"
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11, which all later ones load
# No fast-math: statistics need NaN, infinity and the order of operations. No automatic fusing: see vec.h.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_VNNI = (*_AVX512, "-mavx512vnni")
_AMX = (*_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
# Flags of every build of a source. What an instruction set runs is the best of them: kernels_named in bindings.cpp.
_Builds = Mapping[str, Mapping[str, tuple[str, ...]]]
_X86_BUILDS: _Builds = {
    "attention": {"amx": _AMX, "avx512": _AVX512, "avx2": _AVX2, "baseline": ("-msse4.2",)},
    "linear": {"amx": _AMX, "vnni": _VNNI, "avx2": _AVX2, "baseline": ("-msse4.2",)},
    "rows": {"avx512": _AVX512, "avx2": _AVX2, "baseline": ("-msse4.2",)},
}
_OTHER_BUILDS: _Builds = {source: {"baseline": ()} for source in _X86_BUILDS}
_PORTABLE = ("thread_pool", "operators", "decoder", "observer")
_CUDA_SOURCES = _SOURCES / "cuda"
_HEAD_SIZES = (64, 80, 96, 128)
_CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100f", "120f")  # f: and later ones of the family
_NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"--threads={len(_CUDA_ARCHITECTURES)}",
    "-gencode=arch=compute_80,code=compute_80",  # PTX, for whatever comes later
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in _CUDA_ARCHITECTURES),
)


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says what to do."""


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
    return ("amx", "vnni", "avx512", "avx2", "baseline") if _is_x86() else ("baseline",)


def nvcc() -> str | None:
    """CUDA's compiler, if it is on the PATH or where its installer puts it."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiler() -> str:
    """The C++ compiler that is used."""
    return os.environ.get("CXX", "g++")


def build(*, with_cuda: bool | None = None) -> Path:
    """The library, compiled if the cache folder does not hold it; beside it, build.log with the compilers' reports.

    `with_cuda`: by default, where there is a CUDA device and nvcc. Raises BuildError.
    """
    if prebuilt := os.environ.get("PAGESTREAM_KERNELS"):
        return Path(prebuilt)
    cpp_compiler = compiler()
    if with_cuda is None:
        with_cuda = torch.cuda.is_available() and nvcc() is not None
    cuda_compiler = nvcc() if with_cuda else None
    if with_cuda and cuda_compiler is None:
        raise BuildError("no CUDA compiler: install the CUDA toolkit (12.9 or later) and put nvcc on the PATH")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagestream" / "kernels"
        target = cache / _fingerprint(cpp_compiler, cuda_compiler)
        if not (target / _LIBRARY).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-", ignore_cleanup_errors=True) as aside:
                _compile(cpp_compiler, cuda_compiler, Path(aside))
                with contextlib.suppress(OSError):  # another process was first: its library is the same
                    Path(aside).rename(target)
    except FileNotFoundError as error:
        raise BuildError(
            f"no C++ compiler ({cpp_compiler}): install g++ 11 or later (`apt-get install g++`)"
        ) from error
    except OSError as error:
        raise BuildError(f"{error}: set XDG_CACHE_HOME to a folder that can be written") from error
    return target / _LIBRARY


def _fingerprint(compiler: str, cuda_compiler: str | None) -> str:
    flags = (_FLAGS, _builds(), _TORCH_TARGET, _NVCC_FLAGS, cuda_compiler is not None)
    digest = hashlib.sha256(repr(flags).encode())
    for program in filter(None, (compiler, cuda_compiler)):
        digest.update(subprocess.run([program, "--version"], capture_output=True, check=False).stdout)  # noqa: S603  # the user's own
    for source in sorted(path for path in _SOURCES.rglob("*") if path.suffix in {".h", ".cpp", ".cu"}):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, cuda_compiler: str | None, folder: Path) -> None:
    what = "the CPU kernels (once, a few seconds)" if cuda_compiler is None else "the kernels (once, a minute or two)"
    sys.stderr.write(f"pagestream: compiling {what} ... ")
    sys.stderr.flush()
    started = time.monotonic()
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    commands = {name: [compiler, *_FLAGS, *arguments] for name, arguments in _cpp_commands(cuda_compiler).items()}
    link = [compiler, "-shared", "-pthread"]
    if cuda_compiler is not None:
        commands |= {
            name: [cuda_compiler, *_NVCC_FLAGS, f"-I{_CUDA_SOURCES / 'device'}", *arguments]
            for name, arguments in _cuda_commands().items()
        }
        link = [cuda_compiler, "-shared", "-cudart=static", "-Xcompiler=-pthread"]
    log = _run_all([[*command, "-o", str(folder / name)] for name, command in commands.items()])
    log += _run_all([[*link, *(str(folder / name) for name in commands), *libraries, "-o", str(folder / _LIBRARY)]])
    (folder / _LOG).write_text(log)
    sys.stderr.write(f"{time.monotonic() - started:.1f} s\n")


def _cuda_commands() -> dict[str, list[str]]:
    commands = {f"{name}_cuda.o": ["-c", str(_CUDA_SOURCES / f"{name}.cu")] for name in ("plan", "append")}
    for size in _HEAD_SIZES:  # one object each, to be compiled at the same time
        commands[f"attention_cuda_{size}.o"] = [
            f"-DPAGESTREAM_HEAD_SIZE={size}",
            "-c",
            str(_CUDA_SOURCES / "attention.cu"),
        ]
    return commands


def _cpp_commands(cuda_compiler: str | None) -> dict[str, list[str]]:
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
    commands |= {f"{name}.o": ["-c", str(_SOURCES / f"{name}.cpp")] for name in _PORTABLE}
    torch_headers = ["-isystem", str(Path(torch.__file__).parent / "include")]
    for name in ("bindings", "bindings_cuda")[: 1 if cuda_compiler is None else 2]:
        commands[f"{name}.o"] = [_TORCH_TARGET, *torch_headers, "-c", str(_SOURCES / f"{name}.cpp")]
    return commands


def _run_all(commands: list[list[str]]) -> str:
    """Run the commands at the same time; what they print."""
    pipe, text = subprocess.PIPE, subprocess.STDOUT
    processes = [subprocess.Popen(command, stdout=pipe, stderr=text, text=True) for command in commands]  # noqa: S603
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            raise BuildError(f"the compiler failed: {output.strip()[:2000]}")
    return "".join(outputs)


@functools.cache
def load() -> Status:
    """Make the operators ready, once per process: C++ (and CUDA), or with one warning the reference."""
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
    sys.stdout.write(f"{build(with_cuda=True if '--cuda' in sys.argv[1:] else None)}\n")
