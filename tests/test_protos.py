"""Promises of the interface that the generator does not make."""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor

from pagestream.v1 import generation_pb2 as pb


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
