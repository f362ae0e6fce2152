"""`pagestream doctor`: looks at what a server needs of this machine, and says what to do about what is missing."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pagestream.kernels import build, selftest
from pagestream.model.checkpoint import check_tensors, open_checkpoint
from pagestream.model.default_model import DEFAULT_MODEL, check_default_model
from pagestream.model.errors import ModelError
from pagestream.model.memory import available_memory
from pagestream.server.config import ServerConfig
from pagestream.server.keys import KeyFile
from pagestream.server.tls import TlsFiles, server_context

_LEAST_BESIDE_WEIGHTS = 500_000_000  # bytes: libraries, activations and a small cache of keys and values
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` is what to do; empty where there is nothing to do."""

    what: str
    found: str
    good: bool = True
    advice: str = ""


Check = Callable[[ServerConfig], Iterator[Finding]]


def examine(config: ServerConfig) -> Iterator[Finding]:
    """One finding after the other, as they are made."""
    for check in (_cpu, _kernels, _compiler, _gpu, _model, _ports, _locks):
        yield from check(config)


def _cpu(_config: ServerConfig) -> Iterator[Finding]:
    cores = f"{torch.get_num_threads()} threads for torch"
    if platform.machine() != "x86_64":
        advice = "kernels are built for x86-64's vector units; others run their baseline"
        yield Finding("CPU", f"{platform.machine()}, {cores}", advice=advice)
        return
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    have = [flag for flag in _CPU_FLAGS if flag in flags]
    advice = "" if "avx2" in flags else "a CPU with AVX2 or better is several times faster"
    yield Finding("CPU", f"{', '.join(have) or 'no AVX2'}; {cores}", bool(have), advice)


def _compiler(_config: ServerConfig) -> Iterator[Finding]:
    compiler = build.compiler()
    path = shutil.which(compiler)
    if path is None:
        needed = build.load().implementation != "cpp"  # else they were built elsewhere
        advice = "install g++ 11 or later" if needed else ""
        yield Finding("compiler", f"{compiler} is not on the PATH", not needed, advice)
        return
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    yield Finding("compiler", (version.stdout.splitlines() or [path])[0])


def _kernels(_config: ServerConfig) -> Iterator[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said below
        try:
            status = build.load()
        except ValueError as error:
            yield Finding("kernels", str(error), good=False, advice="unset PAGESTREAM_CPU_ISA")
            return
    if status.implementation != "cpp":
        yield Finding("kernels", "the slow reference", good=False, advice=status.detail)
        return
    yield Finding("kernels", f"built for {status.isa}: {status.detail}")
    yield from _self_test()


def _self_test() -> Iterator[Finding]:
    kinds = (torch.float32, torch.bfloat16)
    settings = [selftest.Setting(torch.device("cpu"), kind, kind, 3, 64, 32) for kind in kinds]
    checks = [check for setting in settings for check in selftest.run(setting)]
    failed = sorted({check.test for check in checks if not check.passed})
    if failed:
        advice = "do not serve from this machine: kernels, compiler or memory compute wrongly; report it"
        yield Finding("kernel self-test", f"{', '.join(failed)} failed", good=False, advice=advice)
    else:
        worst = max(check.error for check in checks)
        yield Finding("kernel self-test", f"{len(checks)} passed, worst error {worst:.0%} of what is allowed")


def _gpu(config: ServerConfig) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        wanted = config.device == "cuda"
        advice = "install a driver and a torch with CUDA, or serve with --device cpu" if wanted else ""
        yield Finding("GPU", "none that torch can use; the CPU serves", not wanted, advice)
        return
    free, total = torch.cuda.mem_get_info()
    yield Finding("GPU", f"{torch.cuda.get_device_name()}, {_gb(free)} of {_gb(total)} free, CUDA {torch.version.cuda}")
    if build.nvcc() is None:
        yield Finding("CUDA compiler", "no nvcc", good=False, advice="install the CUDA toolkit, 12.9 or later")


def _model(config: ServerConfig) -> Iterator[Finding]:
    path = Path(config.model).expanduser()
    try:
        if config.model == DEFAULT_MODEL:
            path = check_default_model(config.cache_dir)
        checkpoint = open_checkpoint(path)
        yield Finding("model", f"{path}{', checksum right' if config.model == DEFAULT_MODEL else ''}")
        check_tensors(checkpoint)
    except ModelError as error:
        yield Finding("model", str(error), good=False, advice="pagestream pull, or name a model that is there")
        return
    available = available_memory(torch.device("cpu"))
    needed = checkpoint.source_bytes + (config.kv_memory or 0) + _LEAST_BESIDE_WEIGHTS
    advice = "choose a smaller model or --kv-memory, or give the container more"
    enough = available >= needed
    found = f"{_gb(available)} available, at least {_gb(needed)} needed in the dtype of the files"
    yield Finding("memory", found, enough, "" if enough else advice)


def _ports(config: ServerConfig) -> Iterator[Finding]:
    for name, port in (("grpc_port", config.grpc_port), ("http_port", config.http_port)):
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            socket.create_server((config.host, port), family=family).close()
        except OSError as error:
            advice = f"stop what listens there, or choose another --{name.replace('_', '-')}"
            yield Finding(name, f"{config.host}:{port}: {error.strerror}", good=False, advice=advice)
        else:
            yield Finding(name, f"{config.host}:{port} is free")


def _locks(config: ServerConfig) -> Iterator[Finding]:
    if config.tls_cert and config.tls_key:
        tls = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
        yield _usable("certificate", config.tls_cert, lambda: server_context(tls))
    if config.keys_file:
        file = config.keys_file
        yield _usable("keys", file, lambda: KeyFile(file))


def _usable(what: str, file: Path, load: Callable[[], object]) -> Finding:
    try:
        load()
    except OSError as error:
        return Finding(what, str(error), good=False, advice="put right what it names; it is read as this user")
    return Finding(what, f"{file} can be used")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
