"""What quantised arithmetic costs in quality: perplexity of the default model in each dtype against fp32 on the same
weights, and how often the likeliest token is the same.

Method: 20,480 tokens of Python's own help texts (`pydoc_data`), in windows of 512, every token but a window's first
predicted from those before it in its window, by the network as it is served (paged cache, a chunk of 512 rows). fp32
multiplies the same 4-bit weights, widened. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from record import save
from rich.progress import track

from pagestream.model.batch import build_batch
from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.default_model import resolve_model
from pagestream.model.loader import load_model
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.tokenizer import load_tokenizer
from pagestream.server.config import default_cache_dir

WINDOW, PAGE_SIZE = 512, 32


def windows(path: Path, count: int) -> list[list[int]]:
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = load_tokenizer(path).encode(text, add_special_tokens=False)
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def log_probabilities(path: Path, dtype: str, kv_dtype: str, texts: list[list[int]]) -> Iterator[torch.Tensor]:
    """Per window, of all tokens at every place [WINDOW - 1, V]."""
    model = load_model(
        open_checkpoint(path),
        dtype=dtype,
        kv_dtype=kv_dtype,
        device="cpu",
        page_size=PAGE_SIZE,
        max_context=WINDOW,
        token_budget=WINDOW,
        kv_memory=64 << 20,
    )
    runner = model.runner
    network, cache = runner._network, runner._cache  # noqa: SLF001 - a step returns no logits
    for text in texts:
        chunk = Chunk("text", text, WINDOW, 0, WINDOW, list(range(WINDOW // PAGE_SIZE)), SamplingParams())
        batch = build_batch(StepPlan((chunk,)), PAGE_SIZE, torch.device("cpu"))
        yield network.outputs(replace(batch, sampled_rows=torch.arange(WINDOW - 1)), cache).logits.log_softmax(-1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments.add_argument("--windows", type=int, default=40)
    options = arguments.parse_args()
    path = resolve_model("default", default_cache_dir())
    texts = windows(path, options.windows)
    kinds = [("fp32", "fp32"), ("bf16", "bf16"), ("int4", "fp32"), ("int4", "bf16"), ("int4", "int8")]
    runs = zip(*(log_probabilities(path, *kind, texts) for kind in kinds), strict=True)
    losses: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    agreement = dict.fromkeys(kinds, 0)
    for text, results in track(zip(texts, runs, strict=True), total=len(texts)):
        exact = results[0].argmax(-1)
        for kind, result in zip(kinds, results, strict=True):
            losses[kind].append(-result.gather(1, torch.tensor(text[1:])[:, None]).mean().item())
            agreement[kind] += int((result.argmax(-1) == exact).sum())
    tokens = len(texts) * (WINDOW - 1)
    table = {
        f"{dtype}, {kv} KV": {
            "perplexity": math.exp(sum(losses[dtype, kv]) / len(texts)),
            "over fp32": math.exp(sum(losses[dtype, kv]) / len(texts) - sum(losses["fp32", "fp32"]) / len(texts)),
            "greedy agreement": agreement[dtype, kv] / tokens,
        }
        for dtype, kv in kinds
    }
    save("perplexity", {"tokens": tokens, "dtypes": table}, options.out)


if __name__ == "__main__":
    main()
