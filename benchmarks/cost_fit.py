"""Whether the cost model's c is the attention's: fitted to step times alone, beside what operations and kernels say.

Method: the engine as it is served, in this process, without gRPC. Prompts of random tokens, 128 to 8,000, in random
order, each alone, with a few tokens of answer. The model is fitted on line to the times of steps, as always. Beside it
stand, over the same steps, the seconds that the compiled network itself counts in attention and in products with
weights, and the rest of their time, fitted to the same tokens and squares by least squares through 0.

Operations: 2 P' per prompt token (P': parameters less the embedding), 2 L Hq d per token squared. At equal rates they
cost the same at P' / (L Hq d) tokens. But attention and products run at different rates, which change when either gets
faster, and a prompt's tokens cost more than products. So the forecast of c is its operations at the rate that attention
ran at (`c_fitted_over_operations`), which holds whatever products cost. The crossover is foretold three times: by
operations at equal rates (of the model alone), at the two rates (as if there were nothing but products), and by the
kernels' clock. `first_token_over_forecast` is what each prompt but the first of its length took over what was foretold
when it arrived. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import queue
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import read_bandwidth, save

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.default_model import resolve_model
from pagestream.model.runner import Runner
from pagestream.model.step import SamplingParams, StepPlan, StepResult
from pagestream.model.text_stream import TextStream
from pagestream.model.weights import count_parameters
from pagestream.server.assemble import assemble
from pagestream.server.config import ServerConfig, let_idle_threads_sleep
from pagestream.server.cost_model import work_of
from pagestream.server.events import Failed, Finished
from pagestream.server.job import Job, Publication
from pagestream.server.metrics import Metrics
from pagestream.server.request import Request

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8000)


class Kernels:
    """Seconds in attention, in products and outside attention of each step that reads a prompt, with its tokens and
    squares."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float, float, float]] = []

    def watch(self) -> None:
        run = Runner.step

        def step(runner: Runner, plan: StepPlan) -> StepResult:
            begun = time.perf_counter()
            result = run(runner, plan)
            seconds = time.perf_counter() - begun
            work = work_of(plan.chunks)
            if work.tokens:
                attention, products = result.seconds or (0.0, 0.0)
                self.steps.append((work.tokens, work.squares, attention, products, seconds - attention))
            return result

        Runner.step = step  # type: ignore[method-assign]

    def seconds_per(self) -> tuple[float, float, float]:
        """Of attention per token squared, of products per token, of all but attention per token."""
        tokens, squares, attention, products, rest = np.array(self.steps, float).T
        per_square = squares @ attention / (squares @ squares)
        per_token = [tokens @ each / (tokens @ tokens) for each in (products, rest)]
        return float(per_square), float(per_token[0]), float(per_token[1])


Ratios = dict[int, list[float]]  # of first tokens over their forecasts, by the prompt's length


def run(model: str, seconds: float) -> tuple[Metrics, Kernels, Ratios]:
    """Reads prompts for so long, each length at least once."""
    kernels, metrics, ends = Kernels(), Metrics(), queue.SimpleQueue[Finished | Failed]()
    kernels.watch()

    def publish(publication: Publication) -> None:
        for _, event in publication:
            if isinstance(event, Finished | Failed):
                ends.put(event)

    served = assemble(ServerConfig(model=model, prefix_cache=False, speculation=False), metrics, publish, lambda: None)
    kernels.steps.clear()  # the warm-up
    ratios: Ratios = {length: [] for length in LENGTHS}
    until = time.monotonic() + seconds
    while not ratios[LENGTHS[0]] or time.monotonic() < until:
        for length in random.sample(LENGTHS, len(LENGTHS)):
            prompt = random.choices(range(1000, 40_000), k=length)  # noqa: S311 - not a secret
            request = Request(f"{length} {len(ratios[length])}", prompt, SamplingParams(), 16)
            served.engine.inbox.submit(Job(request, TextStream(served.tokenizer), time.monotonic()))
            match ends.get():
                case Failed(error):
                    raise error
                case Finished(timings=timings):
                    forecast = timings.predicted_time_to_first_token or math.nan  # before there is a fit
                    ratios[length].append((timings.time_to_first_token or 0.0) / forecast)
    served.engine.stop()
    return metrics, kernels, ratios


def describe(ratios: Ratios) -> dict[str, Any]:
    """Medians by length without the first of each, and how many of all were within a quarter of their forecast."""
    later = {length: each[1:] for length, each in ratios.items() if len(each) > 1}
    every = [ratio for each in later.values() for ratio in each]
    close = sum(abs(ratio - 1) <= 0.25 for ratio in every)
    return {
        "prompts": len(every),
        "median": {str(length): statistics.median(each) for length, each in later.items()},
        "within_25_percent": close / len(every) if every else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    let_idle_threads_sleep()
    metrics, kernels, ratios = run(options.model, options.seconds)
    config = open_checkpoint(resolve_model(options.model, ServerConfig().cache_dir, print)).config
    parameters = count_parameters(config) - config.vocab_size * config.hidden_size
    queries = config.num_layers * config.num_heads * config.head_dim
    attention, products, rest = kernels.seconds_per()
    rates = {"attention": 2 * queries / attention, "products": 2 * parameters / products}
    values = metrics.read().values
    fit = {
        term: {
            "seconds": value,
            "lower95": values["cost_fit_lower95_seconds"][term,],
            "upper95": values["cost_fit_upper95_seconds"][term,],
        }
        for (term,), value in values["cost_fit_seconds"].items()
    }
    forecast = parameters / queries * rates["attention"] / rates["products"]
    fitted = fit["prefill_b"]["seconds"] / fit["prefill_c"]["seconds"] if fit["prefill_c"]["seconds"] else None
    of_operations = fit["prefill_c"]["seconds"] / (2 * queries / rates["attention"])
    residuals = metrics.read().histograms["cost_residual_ratio"]
    result: dict[str, Any] = {
        "read_bandwidth_gb_s": read_bandwidth() / 1e9,
        "prompts": sum(map(len, ratios.values())),
        "first_token_over_forecast": describe(ratios),
        "steps": {phase: values["cost_fit_samples"][phase,] for phase in ("prefill", "decode")},
        "fit": fit,
        "is_quadratic": fit["prefill_c"]["lower95"] > 0,
        "flops_per_second": rates,
        "crossover_tokens": {
            "operations_at_equal_rates": parameters / queries,
            "operations_at_measured_rates": forecast,
            "clock": rest / attention,
            "fitted": fitted,
        },
        "c_fitted_over_operations": of_operations,
        "is_within_25_percent": abs(of_operations - 1) <= 0.25,
        "b_fitted_over_products_kernel": fit["prefill_b"]["seconds"] / products,
        "mean_residual_ratio": (residuals.sums / residuals.counts[:, -1]).tolist(),  # prefill, decode
        "achieved_bytes_per_second": {what: v for (what,), v in values["achieved_bandwidth_bytes_per_second"].items()},
    }
    save("cost_fit", result, options.out)


if __name__ == "__main__":
    main()
