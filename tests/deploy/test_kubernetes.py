"""Every overlay renders, validates against three Kubernetes versions and fits the server; planted mistakes do not."""

from __future__ import annotations

import copy
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.deploy.manifests import Complain, Object, only, problems, render
from tests.support.certificates import make_pair
from tests.support.process import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
POD = "spec.template.spec"
SERVER = f"{POD}.containers.0"
WITH_TLS = {
    "resources": DEPLOY / "kubernetes" / "overlays" / "cpu",
    "components": DEPLOY / "kubernetes" / "components" / "tls",
}
GONE = object()  # what a mistake leaves out

MISTAKES: list[tuple[str, str, str, object]] = [  # overlay, kind, path, what stands there instead
    ("cpu", "Deployment", "spec.strategy.rollingUpdate.maxSurge", [1]),
    ("cpu", "Deployment", f"{SERVER}.readinesProbe", {"grpc": {"port": 50051}}),
    ("cpu", "Deployment", f"{SERVER}.readinessProbe.grpc.port", "grpc"),
    ("cpu", "Deployment", f"{SERVER}.readinessProbe.grpc.port", 50052),
    ("cpu", "Deployment", f"{SERVER}.readinessProbe.grpc.service", "ready"),
    ("cpu", "Deployment", f"{SERVER}.startupProbe.grpc.service", "liveness"),
    ("cpu", "Deployment", f"{SERVER}.livenessProbe.grpc.service", GONE),
    ("cpu", "Deployment", f"{SERVER}.ports.0.containerPort", 50052),
    ("cpu", "Deployment", f"{SERVER}.args", ["serve", "--config", "/etc/pagestream/other.toml"]),
    ("cpu", "Deployment", f"{SERVER}.lifecycle.preStop.sleep.seconds", 15),
    ("cpu", "Deployment", f"{SERVER}.securityContext.readOnlyRootFilesystem", GONE),
    ("cpu", "Deployment", f"{SERVER}.securityContext.allowPrivilegeEscalation", GONE),
    ("cpu", "Deployment", f"{SERVER}.securityContext.capabilities.add", ["NET_ADMIN"]),
    ("cpu", "Deployment", f"{POD}.initContainers.0.securityContext", GONE),
    ("cpu", "Deployment", f"{POD}.initContainers.0.volumeMounts.0.mountPath", "/elsewhere"),
    ("cpu", "Deployment", f"{POD}.initContainers.0.volumeMounts.0.name", "tmp"),
    ("cpu", "Deployment", f"{POD}.securityContext.runAsNonRoot", False),
    ("cpu", "Deployment", f"{POD}.securityContext.runAsUser", 0),
    ("cpu", "Deployment", f"{POD}.securityContext.seccompProfile", GONE),
    ("cpu", "Deployment", f"{POD}.automountServiceAccountToken", GONE),
    ("cpu", "Deployment", f"{POD}.terminationGracePeriodSeconds", 30),
    ("cpu", "Deployment", f"{POD}.terminationGracePeriodSeconds", "45s"),
    ("cpu", "Deployment", f"{POD}.topologySpreadConstraints", GONE),
    ("cpu", "Deployment", f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels", {"app": "pagestream"}),
    ("cpu", "Deployment", f"{POD}.volumes.0.configMap.name", "pagestream"),
    ("cpu", "Deployment", f"{SERVER}.image", "pagestream:latest"),
    ("cpu", "Deployment", f"{SERVER}.image", "registry.example:5000/pagestream"),
    ("cpu", "Deployment", f"{SERVER}.resources.limits.cpu", "8"),
    ("cpu", "Deployment", f"{SERVER}.resources.limits.memory", "1Gi"),
    ("cpu", "Deployment", f"{SERVER}.resources", {of: {"cpu": "4", "memory": "1Gi"} for of in ("limits", "requests")}),
    ("cpu", "Deployment", "spec.replicas", 2),
    ("cpu", "Deployment", "metadata.name", "server"),
    ("cpu", "Service", "spec.clusterIP", GONE),
    ("cpu", "Service", "spec.selector", {"app": "pagestream"}),
    ("cpu", "Service", "spec.ports.0.targetPort", "http"),
    ("cpu", "Service", "spec.ports.0.appProtocoll", "kubernetes.io/h2c"),
    ("cpu", "PodDisruptionBudget", "spec.selector", {"matchLabels": {"app": "pagestream"}}),
    ("cpu", "PodDisruptionBudget", "apiVersion", "policy/v1beta1"),
    ("cpu", "NetworkPolicy", "spec.podSelector", {}),
    ("cpu", "NetworkPolicy", "spec.ingress.0.ports.0.port", "http"),
    ("cpu", "NetworkPolicy", "spec.ingress.0.from.0.podSelector.matchLabels", {"app.kubernetes.io/name": "pagestream"}),
    ("cpu", "ServiceMonitor", "spec.endpoints.0.intervall", "15s"),
    ("cpu", "ServiceMonitor", "spec.endpoints.0.port", "http"),
    ("cpu", "ServiceMonitor", "spec.endpoints", {}),
    ("cpu", "HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "pagestream_waiting_tokens"),
    ("cpu", "HorizontalPodAutoscaler", "spec.scaleTargetRef.name", "server"),
    ("cpu", "HorizontalPodAutoscaler", "spec.maxReplicas", "8"),
    ("gpu", "ScaledObject", "spec.triggers.0.metadata.query", "sum(pagestream_waiting_tokens)"),
    ("gpu", "ScaledObject", "spec.triggers.0.meta", {}),
    ("gpu", "ScaledObject", "spec.scaleTargetRef.name", "server"),
    ("gpu", "Deployment", f"{SERVER}.resources.limits", {"cpu": "4", "memory": "16Gi"}),
    ("gpu", "Deployment", f"{POD}.volumes.0", GONE),
    ("tls", "Deployment", f"{SERVER}.readinessProbe", {"grpc": {"port": 50051}}),
    ("tls", "Deployment", f"{SERVER}.readinessProbe.httpGet.scheme", "HTTP"),
    ("tls", "Deployment", f"{SERVER}.readinessProbe.httpGet.path", "/"),
    ("tls", "Deployment", f"{SERVER}.startupProbe.httpGet.scheme", "https"),
    ("tls", "Deployment", f"{SERVER}.livenessProbe.httpGet", {"path": "/healthz", "port": "metrics"}),
    ("tls", "Deployment", f"{SERVER}.livenessProbe.exec.command", ["pagestream", "health", "--service", "liveness"]),
    ("tls", "Deployment", f"{SERVER}.livenessProbe.exec.command.3", "alive"),
    ("tls", "Deployment", f"{SERVER}.livenessProbe.exec.command.5", "/etc/certificates/ca.crt"),
    ("tls", "Deployment", f"{SERVER}.livenessProbe.timeoutSeconds", GONE),
    ("tls", "Deployment", f"{SERVER}.args.3", "--tls-crt=/etc/pagestream-tls/tls.crt"),
    ("tls", "Deployment", f"{SERVER}.args.4", "--threads=4"),
    ("tls", "Deployment", f"{SERVER}.args.5", "--keys-file=/etc/keys.toml"),
    ("tls", "Deployment", f"{POD}.volumes.0.secret.secret", "pagestream-tls"),
    ("tls", "Service", "spec.ports.0.appProtocol", "kubernetes.io/h2c"),
    ("tls", "ServiceMonitor", "spec.endpoints.0.scheme", GONE),
    ("tls", "ServiceMonitor", "spec.endpoints.0.tlsConfig.servername", "localhost"),
    ("tls", "ServiceMonitor", "spec.endpoints.0.authorization.credentials.secret", "x"),
]
SETTINGS = [  # in the ConfigMap: what stands there, and what a mistake makes of it
    ("drain_seconds = 30", "drain_seconds = 60"),
    ("drain_seconds = 30", "drain_second = 30"),
    ("grpc_port = 50051", "grpc_port = 50052"),
    ("threads = 4", "threads = 8"),
    ('kv_memory = "1GiB"', 'kv_memory = "3GiB"'),
    ('kv_memory = "1GiB"', 'kv_memory = "lots"'),
    ('host = "0.0.0.0"', ""),
    ('host = "0.0.0.0"', 'host = "0.0.0.0"\nmodel = "/models/mine"'),
]


@pytest.fixture(scope="module")
def overlays(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Those that there are, and cpu with components/tls."""
    folder = tmp_path_factory.mktemp("overlays") / "tls"
    folder.mkdir()
    kustomization = {name: [os.path.relpath(path, folder)] for name, path in WITH_TLS.items()}
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    folders = [*(DEPLOY / "kubernetes" / "overlays").iterdir(), folder]
    return {folder.name: render(tool, folder) for folder in folders}


def test_every_overlay_is_valid_and_fits_the_server(
    overlays: dict[str, list[Object]], schema_complaints: Complain, tmp_path: Path
) -> None:
    assert set(overlays) == {"cpu", "gpu", "dev", "tls"}
    for name, objects in overlays.items():
        assert (name, problems(objects, tmp_path)) == (name, [])
    assert not any(schema_complaints([one for objects in overlays.values() for one in objects]))


def test_every_kind_is_there(overlays: dict[str, list[Object]]) -> None:
    common = {"ConfigMap", "Deployment", "Service"}
    cluster = common | {"PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"}
    kinds = {name: {one["kind"] for one in objects} for name, objects in overlays.items()}
    assert kinds["tls"] == kinds["cpu"]
    assert kinds["cpu"] == cluster | {"HorizontalPodAutoscaler"}
    assert kinds["gpu"] == cluster | {"ScaledObject", "PersistentVolumeClaim"}
    assert kinds["dev"] == common | {"PersistentVolumeClaim"}


def test_with_tls_the_probes_and_the_flags_are_right_for_a_real_server(
    overlays: dict[str, list[Object]], serve: Callable[..., ServerProcess], tiny_model_path: Path, tmp_path: Path
) -> None:
    """With the files of the Secrets in another folder."""
    (container,) = only(overlays["tls"], "Deployment")["spec"]["template"]["spec"]["containers"]
    for secret in ("pagestream-tls", "pagestream-keys"):
        (tmp_path / secret).mkdir()
    authority = make_pair(tmp_path, "authority")
    own = make_pair(tmp_path, "own", authority)
    for file, name in ((own.cert, "tls.crt"), (own.key, "tls.key"), (authority.cert, "ca.crt")):
        file.rename(tmp_path / "pagestream-tls" / name)
    (tmp_path / "pagestream-keys" / "keys.toml").write_text("")
    flags = [flag.replace("/etc", str(tmp_path)) for flag in container["args"][3:]]
    server = serve(tiny_model_path, "--threads", "1", "--kv-memory", "8MiB", *flags)
    asked = [part.replace("/etc", str(tmp_path)) for part in container["livenessProbe"]["exec"]["command"][1:]]
    command = [sys.executable, "-m", "pagestream.server", *asked, "--address", server.address]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "SERVING\n"
    probe = container["readinessProbe"]["httpGet"]
    url = f"{probe['scheme'].lower()}://{server.http_address}{probe['path']}"
    trusted = ssl.create_default_context(cafile=tmp_path / "pagestream-tls" / "ca.crt")
    with urlopen(url, context=trusted, timeout=20) as answer:  # noqa: S310 - loopback
        assert answer.status == 200


def with_mistake(objects: list[Object], kind: str, path: str, value: object) -> list[Object]:
    objects = copy.deepcopy(objects)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = only(objects, kind)
    for part in parents:
        place = place[part]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return objects


def test_planted_mistakes_are_caught(
    overlays: dict[str, list[Object]], schema_complaints: Complain, tmp_path: Path
) -> None:
    for_schemas = []
    for mistake in MISTAKES:
        objects = with_mistake(overlays[mistake[0]], *mistake[1:])
        assert objects != overlays[mistake[0]], mistake
        try:
            found = problems(objects, tmp_path)
        except (KeyError, TypeError, AttributeError):  # not of the shape that the rules expect: the schemas' business
            found = []
        if not found:
            for_schemas.append((mistake, only(objects, mistake[1])))
    complaints = schema_complaints([one for _, one in for_schemas])
    assert [mistake for (mistake, _), found in zip(for_schemas, complaints, strict=True) if not found] == []


@pytest.mark.parametrize(("right", "wrong"), SETTINGS)
def test_a_wrong_setting_is_caught(overlays: dict[str, list[Object]], tmp_path: Path, right: str, wrong: str) -> None:
    objects = copy.deepcopy(overlays["cpu"])
    data = only(objects, "ConfigMap")["data"]
    assert right in data["pagestream.toml"]
    data["pagestream.toml"] = data["pagestream.toml"].replace(right, wrong)
    assert problems(objects, tmp_path) != []
