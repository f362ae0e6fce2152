"""The settings of a server: defaults, overruled by a TOML file, overruled by flags.

The one file of this folder that reads the environment (XDG_CACHE_HOME, and whether OpenTelemetry is set up there).
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16", "int8", "int4"]
KvDtype = Literal["auto", "fp32", "bf16", "fp16", "int8"]
LogFormat = Literal["text", "json"]

Parse = Callable[[object], object]  # what a file or a flag says -> the value, or ValueError with what is allowed

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", re.ASCII | re.IGNORECASE)
_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


def default_cache_dir() -> Path:
    """Where models are kept: `pagestream` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagestream"


def wants_traces() -> bool:
    """Whether the environment names a receiver of OpenTelemetry spans."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in names)


def let_idle_threads_sleep() -> None:
    """Has torch's threads spin only briefly while they wait for each other, unless the environment says otherwise: by
    default they spin for milliseconds, and beside any other busy process the spinners take the very time slices that
    the work needs. GNU's OpenMP reads this once, when torch is imported. Figures: server/README.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # some tens of microseconds


def parse_size(value: object) -> int:
    """Bytes of "2GiB", "512 MiB", "1.5GB", "65536" or 65536, rounded down. ValueError for anything else."""
    match = _SIZE.fullmatch(str(value).strip()) if isinstance(value, int | str) else None
    size = int(Decimal(match[1]) * _UNITS[(match[2] or "b").lower()]) if match else 0
    if size < 1:
        raise ValueError(f"{value!r} is not a size; write bytes or a unit, such as 2GiB, 512MiB or 1.5GB")
    return size


def _integer(low: int, high: float = math.inf) -> Parse:
    allowed = f"a whole number from {low} to {high}" if high < math.inf else f"a whole number of at least {low}"

    def parse(value: object) -> int:
        if type(value) is not int or not low <= value <= high:  # True is an int, and not one anybody means
            raise ValueError(f"{value!r} is not {allowed}")
        return value

    return parse


def _one_of(*allowed: object) -> Parse:
    def parse(value: object) -> object:
        for choice in allowed:
            if value == choice:
                return choice
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, allowed))}")

    return parse


def _switch(value: object) -> bool:
    if value is True or value is False:
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a number of seconds, 0 or more")
    return float(value)


def _milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a number of milliseconds above 0")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a name")
    return value


def _host(value: object) -> str:
    return _text(value).strip("[]")  # as IPv6 addresses stand before a port


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{value!r} is not a path")
    return Path(value).expanduser()


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything a server can be told. ValueError names a setting that makes no sense and what is allowed.

    None means: as the machine, the model and the other settings allow.
    """

    model: str = "default"  # a Hugging Face folder, a .gguf file or "default"
    device: Device = "auto"
    dtype: Dtype = "auto"
    kv_dtype: KvDtype = "auto"
    # Loopback: TLS and tokens must be set up, so being reachable from a network is a choice, not a default.
    host: str = "127.0.0.1"
    grpc_port: int = 50051  # 0 takes any free port
    http_port: int = 8080
    threads: int | None = None
    kv_memory: int | None = None  # bytes
    max_context: int | None = None  # tokens
    page_size: int = 32  # tokens
    prefix_cache: bool = True  # what requests have computed is kept for those that begin alike
    speculation: bool | None = None  # prompt lookup; None: where a row's result does not depend on the others
    deterministic: bool = False  # a token's bits depend on the tokens before it alone
    token_budget: int = 512  # tokens of one step
    target_gap_ms: float = 60.0  # between tokens of an answer, beside prompts being read
    max_running: int | None = None  # requests in one step; None: 64, or as many as the token budget serves
    max_queue_requests: int = 256
    max_queue_tokens: int = 262_144  # prompt tokens that wait
    slow_reader_seconds: float = 30.0  # how long a stream may wait for its reader
    drain_seconds: float = 30.0
    canary_interval: float = 60.0  # seconds between two scores of a known answer, and 200 times what one took; 0: none
    slo_ttft_ms: float = 2000.0  # objectives that ended requests are counted against
    slo_itl_ms: float = 100.0
    slo_e2e_s: float = 60.0
    attention_every: int = 64  # steps that decode, of which one is observed; 0: none
    cache_dir: Path = field(default_factory=default_cache_dir)
    tls_cert: Path | None = None  # PEM, with the chain; None: plain text
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients must show a certificate of this authority
    keys_file: Path | None = None  # keys.py; None: no token is asked for
    admin_socket: Path | None = None  # where AdminService listens; None: nowhere
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        _parse({name: value for name, value in vars(self).items() if value is not None}, where="")
        if self.grpc_port == self.http_port != 0:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; they must differ")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; one of them is missing")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.max_running is not None and self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget {self.token_budget} is below max_running {self.max_running}; "
                "every running request must get its next token in each step"
            )


_PARSERS: Mapping[str, Parse] = {
    "model": _text,
    "device": _one_of(*get_args(Device)),
    "dtype": _one_of(*get_args(Dtype)),
    "kv_dtype": _one_of(*get_args(KvDtype)),
    "host": _host,
    "grpc_port": _integer(0, 65535),
    "http_port": _integer(0, 65535),
    "threads": _integer(1),
    "kv_memory": parse_size,
    "max_context": _integer(2),  # one token of prompt, one of answer
    "page_size": _one_of(16, 32, 64, 128),  # what the attention kernels take
    "prefix_cache": _switch,
    "speculation": _switch,
    "deterministic": _switch,
    "token_budget": _integer(1),
    "target_gap_ms": _milliseconds,
    "max_running": _integer(1),
    "max_queue_requests": _integer(1),
    "max_queue_tokens": _integer(1),
    "slow_reader_seconds": _seconds,
    "drain_seconds": _seconds,
    "canary_interval": _seconds,
    "slo_ttft_ms": _milliseconds,
    "slo_itl_ms": _milliseconds,
    "slo_e2e_s": _seconds,
    "attention_every": _integer(0),
    "cache_dir": _path,
    "tls_cert": _path,
    "tls_key": _path,
    "tls_client_ca": _path,
    "keys_file": _path,
    "admin_socket": _path,
    "log_format": _one_of(*get_args(LogFormat)),
}


def load_config(file: Path | None, flags: Mapping[str, object]) -> ServerConfig:
    """The configuration of `flags` over `file` over the defaults. `flags` holds only those that were given.

    ValueError for a file that cannot be read, a key that is not a setting or a value that makes no sense.
    """
    settings = _parse(_read_toml(file), where=f"{file}: ") if file else {}
    given = {name.replace("_", "-"): value for name, value in flags.items()}  # as they were typed
    return ServerConfig(**settings | _parse(given, where="--"))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:  # TOML or UTF-8
        raise ValueError(f"{file}: {error}") from error


def _parse(raw: Mapping[str, object], where: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in _PARSERS:
            raise ValueError(f"{where}{key} is not a setting; there are {', '.join(_PARSERS)}")
        if name in parsed:
            raise ValueError(f"{where}{key} is set twice")
        try:
            parsed[name] = _PARSERS[name](value)
        except ValueError as error:
            raise ValueError(f"{where}{key}: {error}") from None
    return parsed
