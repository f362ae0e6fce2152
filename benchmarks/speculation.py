"""What speculation by prompt lookup brings through gRPC: answers that repeat their prompt, and answers that do not.

Method: two servers of the default model, with and without speculation, each in its own process; both get the same
prompts, one stream at a time, in an order drawn anew each round. Tokens per second are those of decoding, from the
first token to the last, as the client sees them; greedy, so both must give the same text, which is checked. Medians
over the rounds. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any

from interference import connect, server
from record import read_bandwidth, save

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

NEW_TOKENS = 96
SETTINGS = {"with": "--speculation", "without": "--no-speculation"}
NOTICE = (
    "The harbour office will be closed from Monday to Wednesday while the new cranes are tested. Ships that arrive on "
    "these days wait outside the eastern pier, where the pilot boat brings letters and fresh water twice a day. "
    "Fishing boats use the old quay. On Thursday the office opens at seven and all papers are dealt with in "
    "the order of arrival."
)
CODE = '''def area_of_rectangle(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("sides must not be negative")
    return width * height


def area_of_triangle(base, height):
    """Return the area of a triangle."""
    if base < 0 or height < 0:
        raise ValueError("sides must not be negative")
    return base * height / 2
'''
PROMPTS = {
    "copy": f"Repeat this text word for word:\n\n{NOTICE}",
    "summary": f"Summarise this text in three sentences, in its own words where possible:\n\n{NOTICE}",
    "edit": f"Rename the parameter height to depth in this code and print all of it again:\n\n{CODE}",
    "story": "Tell a story about a fox who learns to sail.",
    "advice": "How do I prepare for a job interview? Give detailed advice.",
    "explain": "Explain why the sky is blue to a child.",
}


async def decode(stub: GenerationServiceStub, prompt: str) -> tuple[float, str]:
    """Tokens per second, and the text."""
    request = pb.GenerateStreamRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=prompt)]),
        stop=pb.StopConfig(max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    text, first, last = "", 0.0, 0.0
    async for event in stub.GenerateStream(request):
        if event.HasField("delta"):
            last = time.perf_counter()
            first = first or last
            text += event.delta.text
    return (NEW_TOKENS - 1) / (last - first), text


async def measure(addresses: dict[str, str], rounds: int) -> dict[str, Any]:
    chance = random.Random(1)  # noqa: S311 - not a secret
    rates: dict[str, dict[str, list[float]]] = {name: {setting: [] for setting in SETTINGS} for name in PROMPTS}
    async with connect(addresses["with"]) as fast, connect(addresses["without"]) as plain:
        stubs = {"with": fast, "without": plain}
        for number in range(-1, rounds):  # the first warms up
            for name, prompt in PROMPTS.items():
                texts = {}
                for setting in chance.sample(list(SETTINGS), 2):
                    rate, texts[setting] = await decode(stubs[setting], prompt)
                    if number >= 0:
                        rates[name][setting].append(rate)
                if texts["with"] != texts["without"]:
                    raise RuntimeError(f"{name}: the answers differ: {texts}")
    medians = {name: {setting: statistics.median(each[setting]) for setting in each} for name, each in rates.items()}
    ratios = {name: each["with"] / each["without"] for name, each in medians.items()}
    return {"tokens_per_s": medians, "ratio": ratios, "values": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    flags = ("default", "--canary-interval", "0")
    with server(*flags, SETTINGS["with"]) as fast, server(*flags, SETTINGS["without"]) as plain:
        result = asyncio.run(measure({"with": fast, "without": plain}, options.rounds))
    save(
        "speculation", {"read_bandwidth_gb_s": read_bandwidth() / 1e9, "rounds": options.rounds, **result}, options.out
    )


if __name__ == "__main__":
    main()
