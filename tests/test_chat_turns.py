"""A chat that grows turn by turn, over gRPC on the default model: each turn reads only what is new."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import model_pb2
from tests.support.process import ServerProcess

TURNS = ("rivers", "bees", "Rome", "chess", "salt", "Mars", "tea", "jazz", "glass", "owls")


def test_each_turn_of_a_chat_computes_what_is_new(
    serve: Callable[..., ServerProcess], default_model_path: Path
) -> None:
    server = serve(default_model_path, "--threads", "1", "--dtype", "auto")
    messages: list[pb.ChatMessage] = []
    known = 0  # tokens of the conversation so far
    with closing(server.connect()) as client:
        page_size = client.models.GetModel(model_pb2.GetModelRequest()).model.page_size
        for topic in TURNS:
            messages.append(pb.ChatMessage(role="user", content=f"Now tell me something about {topic}."))
            answer = client.stream(chat=pb.Chat(messages=messages), stop=pb.StopConfig(max_tokens=30))
            messages.append(pb.ChatMessage(role="assistant", content=answer.text))
            usage = answer.finished.usage
            new = usage.prompt_tokens - known
            assert 0 < usage.prompt_tokens - usage.cached_tokens <= new + page_size
            known = usage.prompt_tokens + usage.output_tokens
    assert known > 5 * page_size
