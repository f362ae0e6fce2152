"""A file with the wrong RoPE base, served: it starts and answers, and its canaries tell it from a healthy copy."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

from pagestream.loadtest.scrape import MetricsPage, Series
from tests.support.process import ServerProcess
from tests.support.waiting import wait_until

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
BASE = b"llama.rope.freq_base" + struct.pack("<I", 6)  # its GGUF key, and the type of a float that follows


def with_rope_base(model: Path, base: float, folder: Path) -> Path:
    """A copy of a GGUF file with another base and the same name."""
    folder.mkdir()
    copy = shutil.copy(model, folder / model.name)
    with copy.open("r+b") as file:
        place = file.read(2**20).index(BASE) + len(BASE)
        file.seek(place)
        assert struct.unpack("<f", file.read(4)) != (base,)
        file.seek(place)
        file.write(struct.pack("<f", base))
    return copy


def canaries(server: ServerProcess) -> Series:
    wait_until(lambda: server.metric("canary_runs_total", result="ok") > 0, "a canary ran")
    series = MetricsPage(f"http://{server.http_address}/metrics").read()
    return {key: value for key, value in series.items() if key[0].startswith("pagestream_canary_") and key[1]}


def firing(alert: str, folder: Path, promtool: str, series: dict[str, Series], expected: list[str]) -> None:
    """Has Prometheus' own tool evaluate the shipped rules over these readings, held for five minutes."""
    inputs = []
    for instance, reading in series.items():
        for (name, labels), value in reading.items():
            text = ", ".join(f'{label}="{each}"' for label, each in (*labels, ("instance", instance)))
            inputs.append({"series": f"{name}{{{text}}}", "values": f"{value}x40"})
    case = {
        "expr": f'count by (instance) (ALERTS{{alertname="{alert}", alertstate="firing"}})',
        "eval_time": "5m",
        "exp_samples": [{"labels": f'{{instance="{instance}"}}', "value": 1} for instance in expected],
    }
    test = {"interval": "10s", "input_series": inputs, "promql_expr_test": [case]}
    file = folder / f"{alert}.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "10s", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_rope_base_trips_the_canary_of_a_served_model(
    serve: Callable[..., ServerProcess],
    default_model_path: Path,
    tmp_path: Path,
    tool: Callable[[str], str],
    record_property: Callable[[str, object], None],
) -> None:
    wrong = with_rope_base(default_model_path, 1000.0, tmp_path / "wrong")
    flags = ("--dtype", "auto", "--kv-memory", "64MiB", "--canary-interval", "0.1")
    series = {name: canaries(serve(path, *flags)) for name, path in (("well", default_model_path), ("wrong", wrong))}
    score = {
        name: next(v for (n, _), v in each.items() if n == "pagestream_canary_logprob") for name, each in series.items()
    }
    record_property("canary of 256 tokens, nats per token", score)
    assert score["well"] - score["wrong"] > 1
    firing("PagestreamCanaryApart", tmp_path, tool("promtool"), series, ["wrong"])
    firing("PagestreamCanaryLost", tmp_path, tool("promtool"), series, ["wrong"])  # it needs no replica to compare with
    firing("PagestreamCanaryDrop", tmp_path, tool("promtool"), series, [])  # each is its own baseline
