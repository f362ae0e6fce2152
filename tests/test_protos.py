"""Promises of the interface that the generator does not make."""

from __future__ import annotations

import itertools
import pkgutil
import subprocess
import sys

import pytest
from google.protobuf.descriptor import Descriptor

import pagestream.v1
from pagestream.v1 import generation_pb2 as pb

OURS = [f"pagestream.v1.{module.name}" for module in pkgutil.iter_modules(pagestream.v1.__path__)]
GATEWAYS = ["smg_grpc_proto.generated.common_pb2", "smg_grpc_proto.generated.vllm_engine_pb2_grpc"]
GRPC = ["grpc_health.v1.health_pb2_grpc", "grpc_reflection.v1alpha.reflection_pb2_grpc", "google.rpc.status_pb2"]


def _shape(message: Descriptor) -> list[tuple[int, str, str | None, bool, str | None]]:
    return [
        (
            field.number,
            field.name,
            field.message_type.full_name if field.message_type else None,
            field.has_presence,
            field.containing_oneof.name if field.containing_oneof else None,
        )
        for field in message.fields
    ]


def test_unary_and_streaming_requests_are_the_same_field_for_field() -> None:
    assert _shape(pb.GenerateRequest.DESCRIPTOR) == _shape(pb.GenerateStreamRequest.DESCRIPTOR)


def test_every_scalar_setting_tells_unset_from_zero() -> None:
    for message in (pb.SamplingConfig, pb.StopConfig, pb.OutputConfig):
        scalars = [f for f in message.DESCRIPTOR.fields if f.message_type is None and not f.is_repeated]
        assert scalars
        assert all(field.has_presence for field in scalars)


@pytest.mark.parametrize("order", list(itertools.permutations([OURS, GATEWAYS, GRPC])))
def test_generated_modules_load_together_in_any_order(order: tuple[list[str], ...]) -> None:
    """One process has one registry of names, and files of the same name clash in it."""
    assert len(OURS) > 10
    imports = "\n".join(f"import {module}" for modules in order for module in modules)
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
