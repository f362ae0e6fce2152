"""Rules and alerts as promtool, the tool of Prometheus itself, sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"


def run(tool: str, *arguments: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian: prometheus, prometheus-alertmanager)")
    result = subprocess.run([tool, *arguments], check=False, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules_of(name: str) -> list[dict[str, Any]]:
    return [rule for group in load(name)["groups"] for rule in group["rules"]]


def cases_of(name: str) -> list[dict[str, Any]]:
    return [case for test in load(name)["tests"] for case in test["promql_expr_test"]]


def test_configuration_is_valid() -> None:
    run("promtool", "check", "config", "prometheus.yml")


def test_alertmanagers_configuration_is_valid() -> None:
    run("amtool", "check-config", "alertmanager.yml")


@pytest.mark.parametrize("file", ["rules_test.yml", "alerts_test.yml", "slo_burn_test.yml"])
def test_rules_give_what_was_worked_out_by_hand(file: str) -> None:
    run("promtool", "test", "rules", file)


def test_every_recording_rule_has_a_case() -> None:
    tested = " ".join(case["expr"] for case in cases_of("rules_test.yml"))
    assert [rule["record"] for rule in rules_of("rules.yml") if not re.search(rf"{rule['record']}\b", tested)] == [
        "model_ctx:pagestream_inter_token_latency_seconds:p50_5m",  # as those of the first token, from other buckets
        "model_ctx:pagestream_inter_token_latency_seconds:p99_5m",
        "model_ctx:pagestream_inter_token_latency_seconds:mean_10m",  # inside the degradation factor
    ]


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    cases = cases_of("alerts_test.yml") + cases_of("slo_burn_test.yml")
    for alert in (rule["alert"] for rule in rules_of("alerts.yml")):
        expected = [bool(case["exp_samples"]) for case in cases if f'alertname="{alert}"' in case["expr"]]
        assert set(expected) == {True, False}, alert


def test_alerts_say_what_happened_and_what_to_do_and_none_looks_at_entropy() -> None:
    for rule in rules_of("alerts.yml"):
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "warning"}
        assert not re.search("entropy|jsd|coherence|dilution|p_max|_mass", rule["expr"]), rule["alert"]


def test_the_compose_file_mounts_what_is_there_and_names_what_is_scraped() -> None:
    compose = yaml.safe_load((FOLDER.parent / "compose.yaml").read_text())
    services = compose["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    for source in mounts:
        assert source in compose["volumes"] or (FOLDER.parent / source).exists(), source
    for targets in (load("targets/pagestream.yml"), load("targets/alertmanager.yml")):
        (target,) = targets[0]["targets"]
        name, port = target.split(":")
        assert any(published.endswith(f":{port}") for published in services[name]["ports"]), target
    assert all(published.startswith("127.0.0.1:") for service in services.values() for published in service["ports"])
    (source,) = yaml.safe_load((FOLDER.parent / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == load("prometheus.yml")["global"]["scrape_interval"]
