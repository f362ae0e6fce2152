"""Checks Kubernetes objects against the schemas of several versions and custom resources against their models.

Runs in build/tools, the environment of tools.txt: a JSON list of objects in, a JSON list of what is
wrong with each out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import kubernetes_validate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from pydantic import BaseModel, Field, ValidationError

Port = Annotated[int, Field(strict=True, ge=1, le=65535)]


class PoolPort(BaseModel):
    number: Port


class PoolSelector(BaseModel):
    matchLabels: dict[str, str] = Field(min_length=1)  # noqa: N815 - the API's name


class PickerRef(BaseModel):
    name: str = Field(min_length=1)
    port: PoolPort
    group: str = ""
    kind: str = Field("Service", min_length=1)
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"  # noqa: N815


class PoolSpec(BaseModel):
    selector: PoolSelector
    targetPorts: list[PoolPort] = Field(min_length=1, max_length=8)  # noqa: N815
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"  # noqa: N815
    endpointPickerRef: PickerRef  # noqa: N815


class InferencePool(BaseModel):
    """What https://gateway-api-inference-extension.sigs.k8s.io says of version v1: no package has a model of it."""

    apiVersion: str  # noqa: N815
    kind: str
    metadata: dict[str, Any]
    spec: PoolSpec


VERSIONS = ("1.31", "1.34", "1.37")
CUSTOM = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitor,
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("inference.networking.k8s.io/v1", "InferencePool"): InferencePool,
}


def complaints(document: dict[str, Any]) -> Iterator[str]:
    name = f"{document.get('kind')}: "
    if model := CUSTOM.get((document.get("apiVersion"), document.get("kind"))):
        try:
            known = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except ValidationError as error:
            yield name + str(error)
        else:
            yield from (f"{name}{path} is not in the model" for path in unknown(document, known))
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{name}{version}: {error}"


def unknown(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """Keys that the model dropped: it lets any key in, and gives back only those it knows."""
    if isinstance(given, dict):
        for key, value in given.items():
            if isinstance(known, dict) and key in known:
                yield from unknown(value, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from unknown(value, known[index], f"{path}[{index}]")


if __name__ == "__main__":
    json.dump([list(complaints(document)) for document in json.load(sys.stdin)], sys.stdout)
