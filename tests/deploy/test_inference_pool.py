"""Pools by context length behind the llm-d router: what renders is valid, fits the server, and fits itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagestream.server.metric_families import FAMILIES, PREFIX
from tests.deploy.manifests import Complain, Object, only, problems, render

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes" / "inference-pool"
RANGE, ENGINE = "llm-d.ai/context-length-range", "llm-d.ai/engine-type"
SPECS = ("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec")
MISTAKES: list[tuple[str, str, object]] = [  # kind, path, what stands there instead
    ("InferencePool", "spec.appProtocol", "kubernetes.io/h2"),
    ("InferencePool", "spec.appProtocol", "http"),
    ("InferencePool", "spec.targetPorts.0.number", 8080),
    ("InferencePool", "spec.targetPorts.0.number", "50051"),
    ("InferencePool", "spec.targetPort", 50051),
    ("InferencePool", "spec.selector.matchLabels", {"app": "pagestream"}),
    ("InferencePool", "spec.selector.matchLabels", {RANGE: "0-2048"}),
    ("InferencePool", "spec.endpointPickerRef.name", "router"),
    ("InferencePool", "spec.endpointPickerRef.port.number", 9003),
    ("picker", "requestHandler.parsers.0.pluginRef", "openai-parser"),
    ("picker", "schedulingProfiles.0.plugins.0.weight", 4),
    ("picker", "schedulingProfiles.0.plugins.1.pluginRef", "prefix-scorer"),
    ("picker", "plugins.2.parameters.engineConfigs.0.name", "vllm"),
    ("picker", "plugins.2.parameters.engineConfigs.0.queuedRequestsSpec", "pagestream_waiting_requests"),
    ("picker", "plugins.2.parameters.engineConfigs.0.kvUsageSpec", "pagestream_kv_usage"),
]


def of_length(objects: list[Object], wanted: str | None) -> list[Object]:
    return [one for one in objects if one["metadata"].get("labels", {}).get(RANGE) == wanted]


def picker_config(objects: list[Object]) -> Object:
    (text,) = only(of_length(objects, None), "ConfigMap")["data"].values()
    return dict(yaml.safe_load(text))


def router_problems(objects: list[Object]) -> Iterator[str]:
    pool, router = (only(of_length(objects, None), kind) for kind in ("InferencePool", "Deployment"))
    service, config = only(of_length(objects, None), "Service"), picker_config(objects)
    servers = [one["spec"]["template"] for one in objects if one["kind"] == "Deployment" and one is not router]
    for server in servers:
        if not pool["spec"]["selector"]["matchLabels"].items() <= server["metadata"]["labels"].items():
            yield "the pool leaves pods out"
        (container,) = server["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if [port["number"] for port in pool["spec"]["targetPorts"]] != [ports["grpc"]]:
            yield "the pool leads to another port"
        if (
            f"--model-server-metrics-port={ports['metrics']}"
            not in router["spec"]["template"]["spec"]["containers"][0]["args"]
        ):
            yield "the router reads metrics elsewhere"
    if pool["spec"]["appProtocol"] != "kubernetes.io/h2c":
        yield "gRPC needs HTTP/2"
    reference = pool["spec"]["endpointPickerRef"]
    if (reference["name"], reference["port"]["number"]) != (
        service["metadata"]["name"],
        service["spec"]["ports"][0]["port"],
    ):
        yield "the pool's router is not there"
    if pool["spec"]["selector"]["matchLabels"].items() <= router["spec"]["template"]["metadata"]["labels"].items():
        yield "the router is in its own pool"
    yield from _picker_problems(config, {server["metadata"]["labels"][ENGINE] for server in servers})


def _picker_problems(config: Object, engines: set[str]) -> Iterator[str]:
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    used = {one["pluginRef"] for one in profile["plugins"]} | {
        one["pluginRef"] for one in config["requestHandler"]["parsers"]
    }
    if not used <= plugins.keys():
        yield f"nobody made {used - plugins.keys()}"
    if config["requestHandler"]["parsers"] != [{"pluginRef": "vllmgrpc-parser"}]:
        yield "calls cannot be read"
    weights = {one["pluginRef"]: one.get("weight", 0) for one in profile["plugins"]}
    if 2 * weights["context-length-aware"] <= sum(weights.values()):
        yield "an idle pod of the wrong length wins"
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    if {engine["name"]} != engines:
        yield "the pods are of another engine"
    families = {PREFIX + family.name: family for family in FAMILIES}
    for spec in SPECS:
        name, *labels = re.split(r"[{=]", engine[spec])
        family = families.get(name)
        if family is None or family.kind != "gauge" or set(family.labels) != set(labels[:1]):
            yield f"{engine[spec]} is not one series"


def set_at(place: Any, path: str, value: object) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    place[last] = value


@pytest.fixture(scope="module")
def objects(tool: Callable[[str], str]) -> list[Object]:
    return render(tool, FOLDER)


def test_the_pools_are_valid_and_fit_the_server(
    objects: list[Object], schema_complaints: Complain, tmp_path: Path
) -> None:
    assert not any(schema_complaints(objects))
    ranges = {one["metadata"]["labels"].get(RANGE) for one in objects} - {None}
    for wanted in ranges:
        assert problems(of_length(objects, wanted), tmp_path) == []
    assert list(router_problems(objects)) == []
    edges = sorted(tuple(map(int, wanted.split("-"))) for wanted in ranges)
    assert edges[0][0] == 0
    assert [end + 1 for _, end in edges[:-1]] == [begin for begin, _ in edges[1:]]


def test_pods_of_one_length_are_not_the_others(objects: list[Object]) -> None:
    short, long = (
        [one for one in of_length(objects, wanted) if one["kind"] in {"Deployment", "Service"}]
        for wanted in ("0-2048", "2049-131072")
    )
    labels = only(long, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not only(short, "Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert not only(short, "Service")["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize(("kind", "path", "value"), MISTAKES)
def test_planted_mistakes_are_caught(
    objects: list[Object], schema_complaints: Complain, kind: str, path: str, value: object
) -> None:
    objects = copy.deepcopy(objects)
    if kind == "picker":
        data = only(of_length(objects, None), "ConfigMap")["data"]
        config = picker_config(objects)
        set_at(config, path, value)
        data["endpoint_picker.yaml"] = yaml.safe_dump(config)
    else:
        set_at(only(objects, kind), path, value)
    assert list(router_problems(objects)) or schema_complaints([only(objects, "InferencePool")]) != [[]]
