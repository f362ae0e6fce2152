"""A client process that is going to be killed: ADDRESS, how many STREAMS, how many EVENTS to read of each.

Every stream has a connection of its own. Prints a line once all are open and so much is read, then reads on.
"""

from __future__ import annotations

import itertools
import sys

import grpc

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub


def main(address: str, streams: int, events: int) -> None:
    request = pb.GenerateStreamRequest(
        text="doomed", stop=pb.StopConfig(ignore_eos=True), sampling=pb.SamplingConfig(temperature=1)
    )
    calls = []
    for _ in range(streams):
        channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        calls.append(GenerationServiceStub(channel).GenerateStream(request, timeout=600))
    for call in calls:
        next(call)  # accepted
    for call in calls:
        list(itertools.islice(call, events))
    sys.stdout.write("ready to die\n")
    sys.stdout.flush()
    for call in calls:
        list(call)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
