"""Settings: defaults, file, flags, in that order; nonsense is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagestream.server import config as config_module
from pagestream.server.config import ServerConfig, load_config, parse_size

BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def write(folder: Path, text: str) -> Path:
    file = folder / "pagestream.toml"
    file.write_text(text)
    return file


def test_flags_overrule_the_file_which_overrules_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "token_budget = 256\npage-size = 64\nkv-memory = '1.5GB'\n")
    config = load_config(file, {"page_size": 16, "model": "m.gguf"})
    expected = ServerConfig(token_budget=256, page_size=16, kv_memory=1_500_000_000, model="m.gguf")
    assert config == expected
    assert config.grpc_port == 50051


def test_every_setting_can_come_from_the_file(tmp_path: Path) -> None:
    values = {
        "model": "m.gguf", "device": "cpu", "dtype": "bf16", "kv_dtype": "fp16", "host": "::1", "grpc_port": 0,
        "http_port": 0, "threads": 3, "kv_memory": 4096, "max_context": 77, "page_size": 128, "token_budget": 9,
        "max_running": 8, "max_queue_requests": 7, "max_queue_tokens": 6, "target_gap_ms": 7.5,
        "slow_reader_seconds": 1.5, "drain_seconds": 0.5, "cache_dir": "/c", "prefix_cache": False,
        "speculation": False, "deterministic": True, "slo_ttft_ms": 900.0, "slo_itl_ms": 50.0, "slo_e2e_s": 9.0,
        "attention_every": 5, "canary_interval": 30.0,
        "tls_cert": "/s/tls.pem", "tls_key": "/s/tls.key",
        "tls_client_ca": "/s/ca.pem", "keys_file": "/s/keys.toml", "admin_socket": "/s/admin", "log_format": "json",
    }  # fmt: skip
    assert values.keys() == {field.name for field in dataclasses.fields(ServerConfig)}
    file = write(tmp_path, "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    paths = ("cache_dir", "tls_cert", "tls_key", "tls_client_ca", "keys_file", "admin_socket")
    expected = ServerConfig(**values | {name: Path(str(values[name])) for name in paths})  # type: ignore[arg-type]
    assert load_config(file, {}) == expected


def test_an_ipv6_address_may_stand_in_brackets() -> None:
    assert load_config(None, {"host": "[::1]"}) == load_config(None, {"host": "::1"}) == ServerConfig(host="::1")


def test_half_of_a_tls_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        ServerConfig(tls_key=Path("k"))
    with pytest.raises(ValueError, match="needs tls_cert"):
        ServerConfig(tls_client_ca=Path("c"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("device", "gpu", "auto, cpu, cuda"),
        ("dtype", "int2", "auto, fp32, bf16, int8, int4"),
        ("kv_dtype", "int4", "auto, fp32, bf16, fp16, int8"),
        ("grpc_port", 65536, "from 0 to 65535"),
        ("http_port", True, "from 0 to 65535"),
        ("threads", 0, "at least 1"),
        ("max_context", 1, "at least 2"),
        ("page_size", 48, "16, 32, 64, 128"),
        ("page_size", 8, "16, 32, 64, 128"),
        ("token_budget", 1.5, "at least 1"),
        ("max_queue_requests", "many", "at least 1"),
        ("drain_seconds", -1, "0 or more"),
        ("target_gap_ms", 0, "above 0"),
        ("drain_seconds", float("nan"), "0 or more"),
        ("kv_memory", "2 gigs", "such as 2GiB"),
        ("kv_memory", 0, "such as 2GiB"),
        ("model", "", "not a name"),
        ("cache_dir", 5, "not a path"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')}: .*{re.escape(allowed)}"):
        load_config(None, {name: value})
    with pytest.raises(ValueError, match=rf"^{name}: "):
        ServerConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kv_memori = 1", "kv_memori is not a setting; there are model, "),
        ("[server]\nthreads = 2", "server is not a setting"),
        ("page_size = 32\npage-size = 64", "page-size is set twice"),
        ("threads = 'two'", "threads: 'two' is not a whole number"),
        ("threads = ", "Invalid value"),
        ("threads = 2\nthreads = 2", "Cannot overwrite"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{file}: {complaint}')}"):
        load_config(file, {})


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml", {})


def test_the_two_ports_must_differ_unless_both_are_free_ones() -> None:
    with pytest.raises(ValueError, match="grpc_port and http_port are both 8080"):
        load_config(None, {"grpc_port": 8080})
    assert load_config(None, {"grpc_port": 0, "http_port": 0}).grpc_port == 0


def test_models_are_kept_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ServerConfig().cache_dir == tmp_path / "pagestream"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # the XDG standard: empty is unset
    monkeypatch.setenv("HOME", "/home/someone")
    assert ServerConfig().cache_dir == Path("/home/someone/.cache/pagestream")


def test_nothing_else_in_the_server_reads_the_environment() -> None:
    folder = Path(config_module.__file__).parent
    readers = [file.name for file in folder.glob("*.py") if re.search(r"os\.environ|getenv", file.read_text())]
    assert readers == ["config.py"]


@given(st.integers(1, 10**6), st.integers(0, 999), st.sampled_from(sorted(BYTES)), st.sampled_from(["", " "]))
def test_sizes_are_exact_and_rounded_down(whole: int, thousandths: int, unit: str, gap: str) -> None:
    number = f"{whole}.{thousandths:03d}"
    expected = int(Fraction(number) * BYTES[unit])
    for size in (f"{number}{gap}{unit}", f"{number}{unit.lower()}", expected):
        assert parse_size(size) == expected


@given(st.text(max_size=12) | st.integers(max_value=0) | st.floats() | st.booleans())
def test_what_is_not_a_size_is_refused(value: object) -> None:
    if not isinstance(value, str) or not re.match(r"\s*[0-9]", value):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(value)


def test_a_small_token_budget_needs_no_other_setting_but_must_serve_all_that_run() -> None:
    assert ServerConfig(token_budget=8).token_budget == 8
    with pytest.raises(ValueError, match="token_budget 8 is below max_running 9"):
        ServerConfig(token_budget=8, max_running=9)
