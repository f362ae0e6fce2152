"""What must hold of the Kubernetes objects beyond their schemas, most of it against the server's own code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pagestream.server.config import ServerConfig, load_config, parse_size
from pagestream.server.listener import LIVENESS, SERVICES
from pagestream.server.metric_families import FAMILIES, PREFIX

Object = dict[str, Any]
Complain = Callable[[list[Object]], list[list[str]]]  # about each
START_OF_A_PROGRAM = 5  # seconds that a Python may take to come up on a busy node
CLOSING = 5.0  # seconds to end the rest and close connections after the drain
METRICS = {PREFIX + family.name for family in FAMILIES}
BESIDE_KV = 2**30  # bytes beside the KV cache: program, weights of a small model, activations


def render(tool: Callable[[str], str], folder: Path) -> list[Object]:
    command = [tool("kubectl"), "kustomize", folder]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def problems(objects: list[Object], scratch: Path) -> list[str]:
    """`scratch` is a folder for the configuration file."""
    deployment = only(objects, "Deployment")
    template = deployment["spec"]["template"]
    (server,) = template["spec"]["containers"]
    try:
        config = read_config(objects, template["spec"], server, scratch)
    except (LookupError, ValueError) as error:
        return [f"configuration: {error}"]
    return [
        *_ports_and_probes(server, config),
        *_end(template["spec"], server, config),
        *_security(template["spec"]),
        *_resources(server, config),
        *_volumes(template["spec"], config),
        *_service(objects, template["metadata"]["labels"], server),
        *_encryption(objects, encrypted=config.tls_cert is not None),
        *_selectors(objects, template["metadata"]["labels"]),
        *_autoscaling(objects, deployment),
    ]


def only(objects: list[Object], kind: str) -> Object:
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


def read_config(objects: list[Object], pod: Object, server: Object, scratch: Path) -> ServerConfig:
    """What the server reads: the file named in its arguments, from the ConfigMap that is mounted there, and flags."""
    arguments = server["args"]
    file = Path(arguments[arguments.index("--config") + 1])
    mount = next(mount for mount in server["volumeMounts"] if Path(mount["mountPath"]) == file.parent)
    volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    copy = scratch / "pagestream.toml"
    copy.write_text(maps[volume["configMap"]["name"]][file.name])
    flags = [argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument]
    return load_config(copy, {name.replace("-", "_"): value for name, value in flags})


def _ports_and_probes(server: Object, config: ServerConfig) -> Iterator[str]:
    if config.host != "0.0.0.0":  # noqa: S104 - where kubelet, clients and Prometheus come from
        yield f"host {config.host} cannot be reached"
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    if ports != {"grpc": config.grpc_port, "metrics": config.http_port}:
        yield f"ports {ports} are not the server's"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        name, wrong = _asked(server[probe], config)
        yield from (f"{probe}: {each}" for each in wrong)
        if name not in {"", LIVENESS, *SERVICES}:
            yield f"{probe}: the server knows no {name!r}"
        if (name == LIVENESS) != (probe == "livenessProbe"):  # a loading or draining server must not be killed
            yield f"{probe}: asks for {name!r}"
    yield from _files(server, [path for path in (config.tls_cert, config.tls_key, config.keys_file) if path])


def _asked(probe: Object, config: ServerConfig) -> tuple[str, list[str]]:
    """The health service that it asks for, and what is wrong with how it does."""
    match probe:
        case {"grpc": asked}:
            wrong = {
                f"nothing serves gRPC on {asked['port']}": asked["port"] != config.grpc_port,
                "kubelet's gRPC speaks no TLS": config.tls_cert is not None,
            }
            name = asked.get("service", "")
        case {"httpGet": asked}:
            where = (asked["port"], asked.get("scheme", "HTTP"))
            wrong = {f"nothing serves {asked}": where != ("metrics", "HTTPS" if config.tls_cert else "HTTP")}
            name = "" if asked["path"] == "/healthz" else asked["path"]
        case {"exec": {"command": ["pagestream", "health", *options]}}:
            wrong = {
                "TLS on one side only": ("--tls-ca" in options) != (config.tls_cert is not None),
                "too short for a program": probe.get("timeoutSeconds", 1) < START_OF_A_PROGRAM,
            }
            name = dict(pairwise(options)).get("--service", "")
        case _:
            raise KeyError(f"a probe of {sorted(probe)}")
    return name, [each for each, holds in wrong.items() if holds]


def _files(server: Object, paths: list[Path]) -> Iterator[str]:
    probe = server["livenessProbe"].get("exec", {}).get("command", [])
    paths += [Path(ca) for option, ca in pairwise(probe) if option == "--tls-ca"]
    folders = {Path(mount["mountPath"]) for mount in server["volumeMounts"]}
    yield from (f"{path} is not mounted" for path in paths if path.parent not in folders)


def _end(pod: Object, server: Object, config: ServerConfig) -> Iterator[str]:
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    if before + config.drain_seconds + CLOSING > pod["terminationGracePeriodSeconds"]:
        yield "preStop and the drain do not fit into the grace period"


def _security(pod: Object) -> Iterator[str]:
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        name, context = container["name"], container.get("securityContext", {})
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: may write to its image"
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{name}: may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: keeps capabilities"
        if not re.fullmatch(r".+:(?!latest$)[\w.-]+|.+@sha256:\w+", container["image"]):
            yield f"{name}: {container['image']} may be anything"
    context = pod["securityContext"]
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "holds a token of the cluster"


def _resources(server: Object, config: ServerConfig) -> Iterator[str]:
    limits = server["resources"]["limits"]
    if server["resources"]["requests"] != limits:
        yield "requests below limits: the first to be evicted"
    if str(config.threads) != limits["cpu"]:
        yield f"{config.threads} threads on {limits['cpu']} CPUs"
    memory = parse_size(limits["memory"] + "B")
    if config.device == "auto" and (config.kv_memory or memory) + BESIDE_KV > memory:
        yield "the KV cache does not fit into the memory limit"
    if (config.device == "cuda") != ("nvidia.com/gpu" in limits):
        yield f"device {config.device} with {sorted(limits)}"


def _volumes(pod: Object, config: ServerConfig) -> Iterator[str]:
    names = {volume["name"] for volume in pod["volumes"]}
    folders: dict[str, dict[str, str]] = {}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        folders[container["name"]] = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        if missing := set(folders[container["name"]].values()) - names:
            yield f"{container['name']}: no volume {missing}"
        for folder in ("/tmp", "/var/cache/pagestream"):  # noqa: S108 - what the image writes to
            if folder not in folders[container["name"]]:
                yield f"{container['name']}: cannot write to {folder}"
    if len({mounts.get("/var/cache/pagestream") for mounts in folders.values()}) != 1:
        yield "the model is fetched to where nobody looks"
    at_hand = any(Path(config.model).is_relative_to(folder) for folder in folders["pagestream"])
    if config.model != "default" and not at_hand:
        yield f"no volume holds {config.model}"


def _service(objects: list[Object], labels: Object, server: Object) -> Iterator[str]:
    service = only(objects, "Service")["spec"]
    if service.get("clusterIP") != "None":
        yield "the Service is not headless"
    if not service["selector"].items() <= labels.items():
        yield "the Service selects other pods"
    if {port["targetPort"] for port in service["ports"]} != {port["name"] for port in server["ports"]}:
        yield "the Service leads to ports that are not there"
    names = {port["name"] for port in service["ports"]}
    for monitor in (one for one in objects if one["kind"] == "ServiceMonitor"):
        if not {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= names:
            yield "the ServiceMonitor scrapes a port that the Service lacks"


def _encryption(objects: list[Object], *, encrypted: bool) -> Iterator[str]:
    for port in only(objects, "Service")["spec"]["ports"]:
        if port["name"] == "grpc" and (port.get("appProtocol") == "kubernetes.io/h2c") == encrypted:
            yield "the Service says what its gRPC port does not speak"
    for monitor in (one for one in objects if one["kind"] == "ServiceMonitor"):
        if any((endpoint.get("scheme") == "https") != encrypted for endpoint in monitor["spec"]["endpoints"]):
            yield "the ServiceMonitor speaks otherwise than its port"


def _selectors(objects: list[Object], labels: Object) -> Iterator[str]:
    for one in objects:
        spec = one.get("spec", {})
        match one["kind"]:
            case "Deployment":
                spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
                selectors = [spec["selector"], *(constraint["labelSelector"] for constraint in spread)]
                if spec.get("replicas", 2) > 1 and not spread:
                    yield "all pods may be on one node"
            case "PodDisruptionBudget" | "ServiceMonitor":
                selectors = [spec["selector"]]
            case "NetworkPolicy":
                selectors = [spec["podSelector"]]
                if {port["port"] for rule in spec["ingress"] for port in rule["ports"]} != {"grpc", "metrics"}:
                    yield "NetworkPolicy: not the ports of the server"
                peers = [peer.get("podSelector", {}) for rule in spec["ingress"] for peer in rule["from"]]
                if any(labels.items() & peer.get("matchLabels", {}).items() for peer in peers):
                    yield "NetworkPolicy: only servers may call"
            case _:
                continue
        for selector in selectors:
            if not selector.get("matchLabels") or not selector["matchLabels"].items() <= labels.items():
                yield f"{one['kind']}: selects {selector}"


def _autoscaling(objects: list[Object], deployment: Object) -> Iterator[str]:
    scalers = [one for one in objects if one["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}]
    if len(scalers) > 1 or bool(scalers) == ("replicas" in deployment["spec"]):
        yield "not one owner of the number of replicas"
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        if (target.get("kind", "Deployment"), target["name"]) != ("Deployment", deployment["metadata"]["name"]):
            yield f"{scaler['kind']}: scales {target}"
        text = " ".join(_strings(scaler["spec"]))
        if not (used := set(re.findall(rf"\b{PREFIX}\w+", text))) or not used <= METRICS:
            yield f"{scaler['kind']}: the server has not all of {used}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
