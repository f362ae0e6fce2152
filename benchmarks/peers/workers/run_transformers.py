"""transformers' own `generate` in bf16; runs in this project's environment.

usage: run_transformers.py MODEL.gguf THREADS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from protocol import Jobs, Moments, must_be_one_static_batch, serve
from transformers.generation.streamers import BaseStreamer


class Stamps(BaseStreamer):
    """When the prompt was put, then when each token came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


class Model:
    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(path.parent, gguf_file=path.name, dtype=torch.float32).bfloat16()

    def run(self, jobs: Jobs) -> Moments:
        must_be_one_static_batch(jobs)
        tokens = jobs[0]["new_tokens"]
        begun = time.perf_counter()
        stamps = Stamps()
        ids = torch.tensor([job["prompt"] for job in jobs])
        settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **settings)
        return [[stamp - begun for stamp in stamps.seen[1:]]] * len(jobs)


if __name__ == "__main__":
    serve(Model(Path(sys.argv[1]), int(sys.argv[2])).run)
