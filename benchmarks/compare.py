"""Ours beside every peer that is installed, interleaved in one run: `make bench`.

Method: every target is its own process on the same cores; a round measures each once, in an order drawn anew, while all
others are stopped (SIGSTOP); a few tokens wake a target before it is measured. Greedy, past the end of sequence, the
same random token ids for everyone and new ones each round, so that no prefix cache helps. Our service is measured over
gRPC, llama.cpp and vLLM over HTTP, all three by a client in this process; OpenVINO, ONNX Runtime and transformers have
no server here and are driven inside a process of their own, which spares them the network. Medians over the rounds, and
ratios within this run only. Read bandwidth is measured in the same run. A target that fails is listed with its reason.

How to install peers: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import gc
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.fleet import Fleet, reason
from peers.report import print_report, summary
from peers.scenarios import SCENARIOS, Scenario, prompts
from peers.targets import OURS, Target, all_targets
from record import environment, read_bandwidth

from pagestream.model.default_model import resolve_model
from pagestream.server.config import default_cache_dir

Results = dict[str, dict[str, list[float]]]  # target -> metric -> a value for each round

MEASURE_SECONDS = 300.0  # a target that takes longer has failed


class Comparison:
    """Values and failures of one run."""

    def __init__(self, targets: list[Target], fleet: Fleet, seed: int) -> None:
        self.values: dict[str, Results] = {}  # by scenario
        self.failures: list[dict[str, str]] = []
        self.interrupted = False
        self._targets = targets
        self._fleet = fleet
        self._seed = seed

    async def run(self, scenario: Scenario, rounds: int, limit_s: float) -> None:
        """As many rounds as are asked for and as fit into the limit; the first always."""
        left = list(self._targets)
        begun = time.monotonic()
        for number in range(rounds):
            spent = time.monotonic() - begun
            if number > 0 and spent * (number + 1) / number > limit_s:
                say(f"{scenario.name}: {number} of {rounds} rounds in {spent:.0f} s")
                break
            order = random.Random(f"{self._seed} {scenario.name} {number}").sample(left, len(left))  # noqa: S311
            for target in order:
                if not await self._measure(scenario, number, target):
                    left.remove(target)

    async def _measure(self, scenario: Scenario, number: int, target: Target) -> bool:
        prompt = prompts(f"{self._seed} {scenario.name} {number}")
        try:
            async with self._fleet.use(target, scenario.capacity, fresh=scenario.fresh) as running:
                measured = await asyncio.wait_for(scenario.measure(running, prompt), MEASURE_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever a peer does is reported, and the others go on
            failure = {"target": target.name, "scenario": scenario.name, "reason": reason(error)}
            self.failures.append(failure)
            say(f"{scenario.name} round {number + 1} {target.name}: FAILED: {failure['reason']}")
            return False
        results = self.values.setdefault(scenario.name, {each.name: {} for each in self._targets})
        for name, value in measured.items():
            results[target.name].setdefault(name, []).append(value)
        told = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        say(f"{scenario.name} round {number + 1} {target.name}: {told}")
        return True


async def compare(targets: list[Target], options: argparse.Namespace) -> Comparison:
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    warm_up = prompts(f"{options.seed} warm-up")
    gc.freeze()  # a collection that looks through all that torch's import left stops the clients for 0.1 s
    with tempfile.TemporaryDirectory(prefix="pagestream-compare-") as logs:
        fleet = Fleet(Path(logs), lambda: warm_up(32))
        comparison = Comparison(targets, fleet, options.seed)
        try:
            for name in options.scenarios:
                await comparison.run(SCENARIOS[name], options.rounds, options.limit)
        except asyncio.CancelledError:  # what was measured is still worth a report
            comparison.interrupted = True
            say("interrupted")
        finally:
            await fleet.end()
    return comparison


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark's output


def installed(options: argparse.Namespace) -> list[Target]:
    found = all_targets(options.peers, resolve_model("default", default_cache_dir()))
    if options.targets:
        unknown = sorted(set(options.targets) - {target.name for target in found})
        if unknown:
            known = ", ".join(target.name for target in found)
            raise SystemExit(f"no such target: {', '.join(unknown)}; there are {known}")
        found = [target for target in found if target.name in options.targets]
    for target in found:
        if target.missing:
            say(f"{target.name} is not installed (no {target.missing}); benchmarks/peers/setup.sh installs peers")
    return [target for target in found if not target.missing]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    peers = Path(os.environ.get("PEERS_DIR") or default_cache_dir() / "peers")
    result = Path(__file__).parent / f"results/compare-{dt.datetime.now(dt.UTC):%Y-%m-%d}.json"
    add("--peers", type=Path, default=peers, help="where setup.sh put them (PEERS_DIR)")
    add("--targets", nargs="+", metavar="TARGET", help="default: all that are installed")
    add("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO", help="default: all")
    add("--rounds", type=int, default=5)
    add("--limit", type=float, default=150.0, help="seconds a scenario; no round begins that would not fit")
    add("--seed", type=int, default=0, help="of the prompts and of the order")
    add("--result", type=Path, default=result, help="JSON file; a run is added to those it holds")
    return parser.parse_args()


def save(run: dict[str, Any], path: Path) -> None:
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": "compare", "runs": [*runs, run]}, indent=1) + "\n")
    say(f"run {len(runs) + 1} of {path}")


def main() -> None:
    options = parse()
    targets = installed(options)
    bandwidth = read_bandwidth()
    comparison = asyncio.run(compare(targets, options))
    run: dict[str, Any] = {
        **environment(),
        "read_bytes_per_second": bandwidth,
        "targets": {target.name: target.version() for target in targets},
        "rounds": options.rounds,
        "seed": options.seed,
        "values": comparison.values,
        "failures": comparison.failures,
        "interrupted": comparison.interrupted,
    }
    run["summary"] = summary(run)
    print_report(run)
    save(run, options.result)
    if comparison.interrupted or any(failure["target"] == OURS for failure in comparison.failures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
