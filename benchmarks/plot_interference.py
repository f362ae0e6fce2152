"""Draws the trade-off of --target-gap-ms from results of interference.py: the smaller the gap, the longer the prompt
takes.

Three panels over the target: the stream's p99 gap beside the long prompt, the long prompt's time to first token and the
tokens per second while it is read, the latter two as ratios to the same run's measurements alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt


def draw(scenes: dict[float, dict[str, Any]], path: Path) -> None:
    targets = sorted(scenes)
    figure, (gap, first, speed) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    gap.plot(targets, [scenes[target]["gap_beside_ms"]["p99"] for target in targets], "o-", label="p99")
    gap.plot(targets, [scenes[target]["gap_beside_ms"]["p50"] for target in targets], "o-", label="median")
    gap.plot(targets, targets, "--", color="grey", label="target")
    gap.set(title="gap of a stream beside it", ylabel="ms")
    gap.legend()
    first.plot(targets, [scenes[target]["long_ttft_ratio"] for target in targets], "o-")
    first.set(title="the long prompt's time to first token", ylabel="times alone")
    rates = [scenes[target]["tokens_per_s"] for target in targets]
    speed.plot(targets, [rate["beside"] / rate["alone"] for rate in rates], "o-")
    speed.set(title="tokens per second meanwhile", ylabel="times the long prompt alone")
    for axes in (gap, first, speed):
        axes.set(
            xscale="log", xlabel="target gap, ms", xticks=targets, xticklabels=[f"{target:g}" for target in targets]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that interference.py wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "interference.png")
    options = parser.parse_args()
    scenes: dict[float, dict[str, Any]] = {}
    for path in options.results:
        scenes |= {float(target): scene for target, scene in json.loads(path.read_text())["targets"].items()}
    draw(scenes, options.out)


if __name__ == "__main__":
    main()
