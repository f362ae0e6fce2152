"""What a step is asked to say of attention, and the answers as plain data. Definitions: kernels/summary.py, step.py."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagestream.kernels import summary
from pagestream.kernels.summary import FIELDS, Observation
from pagestream.model.agreement import agreement
from pagestream.model.config import ModelConfig
from pagestream.model.routing import entropy
from pagestream.model.step import AttentionSummary, Chunk, GroupSummary, PageSummary, SpanSummary, StatsLevel, StepPlan

Array = npt.NDArray[np.float32]

_COVERED = 0.95


def build_observation(plan: StepPlan, config: ModelConfig, max_pages: int) -> Observation | None:
    """None where no chunk is observed. Raises ValueError for spans that are not inside the observed row's context."""
    rows: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int, int]] = []
    first_row, num_pages = 0, 0
    for sequence, chunk in enumerate(plan.chunks):
        if chunk.attention > StatsLevel.OFF:
            has_pages = chunk.attention >= StatsLevel.PAGES
            spans += [(len(rows), *span) for span in (_spans(chunk) if has_pages else ())]
            rows.append((first_row + chunk.observed_position - chunk.start, sequence, num_pages if has_pages else -1))
            num_pages += has_pages
        first_row += chunk.length
    if not rows:
        return None
    # Not torch.zeros, which for many pages wakes OpenMP's threads: they would spin beside the kernels' own.
    heads, groups = (config.num_layers, config.num_heads), summary.num_groups(config.num_layers)
    return Observation(
        rows=torch.from_numpy(np.array(rows, np.int32)),
        spans=torch.from_numpy(np.array(spans, np.int32).reshape(-1, 3)),
        means=torch.from_numpy(np.empty((len(rows), groups, len(FIELDS) + summary.BANDS), np.float32)),
        page_masses=torch.from_numpy(np.zeros((num_pages, *heads, 1 + max_pages), np.float32)),
        span_shares=torch.from_numpy(np.empty((len(spans), *heads, 2), np.float32)),
    )


def summarize(
    plan: StepPlan, observation: Observation, config: ModelConfig, page_size: int
) -> tuple[AttentionSummary | None, ...]:
    """One for each chunk, None where it is not observed."""
    means = iter(observation.means.tolist())
    masses, shares = iter(observation.page_masses.numpy()), iter(observation.span_shares.numpy())

    def summary_of(chunk: Chunk) -> AttentionSummary:
        n = chunk.observed_position + 1
        pages = None
        if chunk.attention >= StatsLevel.PAGES:
            mass = next(masses)[..., : 1 + -(-n // page_size)]
            pages = _pages(mass, page_size, itertools.islice(shares, len(chunk.spans)), chunk, config)
        groups = next(means)
        return AttentionSummary(
            context=n if 0 in config.windows else min(n, max(config.windows)),
            groups=tuple(map(_group, groups)),
            bands=tuple(tuple(values[len(FIELDS) :]) for values in groups),
            pages=pages,
        )

    return tuple(summary_of(chunk) if chunk.attention > StatsLevel.OFF else None for chunk in plan.chunks)


def _spans(chunk: Chunk) -> Iterator[tuple[int, int]]:
    for begin, end in chunk.spans:
        if not 0 <= begin < end <= chunk.observed_position + 1:
            raise ValueError(f"{chunk.request_id}: span {begin} to {end} in {chunk.observed_position + 1} positions")
        yield begin, end


def _group(values: list[float]) -> GroupSummary:
    of = dict(zip(FIELDS, values, strict=False))  # bands follow
    return GroupSummary(
        heads=round(of["heads"]),
        entropy=of["entropy"],
        entropy_min=of["entropy_min"],
        entropy_max=of["entropy_max"],
        sink_mass=of["sink"],
        recent_mass=of["recent"],
        p_max=of["p_max"],
        rest_heads=round(of["rest_heads"]),
        entropy_rest=of["entropy_rest"],
        log2_distance=of["log2_distance"],
    )


def _pages(masses: Array, page_size: int, shares: Iterator[Array], chunk: Chunk, config: ModelConfig) -> PageSummary:
    """`masses` [L, Hq, 1 + pages] as in an Observation; `shares` of each span [L, Hq, 2]."""
    by_page = masses[..., 1:].reshape(-1, masses.shape[-1] - 1)  # [L * Hq, pages]
    heads, num_pages = by_page.shape
    dropped = np.count_nonzero(np.cumsum(np.sort(by_page), axis=-1) <= 1 - _COVERED)  # of each head's smallest
    first = masses[..., 0]
    rest = masses[..., 1:].copy()
    rest[..., 0] -= first
    n, windows = chunk.observed_position + 1, Counter(config.windows)
    return PageSummary(
        mass=tuple(by_page.mean(0, dtype=np.float64).tolist()),
        entropy=float(entropy(by_page).mean()),
        pages95=num_pages - dropped / heads,
        **agreement(rest, page_size, n),
        spans=_summarize_spans(list(shares), chunk.spans, first, [_uniform(span, n, windows) for span in chunk.spans]),
        head_mass=by_page.tobytes(),
    )


def _uniform(span: tuple[int, int], n: int, windows: Counter[int]) -> float:
    """Mass on a span of n positions if attention were uniform, a mean over layers; `windows` counts them by window."""
    mass = 0.0
    for window, num_layers in windows.items():
        seen = min(window or n, n)
        mass += num_layers * max(span[1] - max(span[0], n - seen), 0) / seen
    return mass / windows.total()


def _summarize_spans(
    shares: list[Array], spans: Sequence[tuple[int, int]], first: Array, uniform: Sequence[float]
) -> tuple[SpanSummary, ...]:
    """`shares` of each span [L, Hq, 2]; `first` [L, Hq]: mass on position 0; `uniform` of each span, as in
    SpanSummary."""
    if not spans:
        return ()
    together = np.array(shares)
    means, largest = together.mean((1, 2), dtype=np.float64).tolist(), together[..., 0].max((1, 2)).tolist()
    sink = float(first.mean(dtype=np.float64))
    return tuple(
        SpanSummary(
            mass=mass,
            mass_without_sink=(mass - sink * (begin == 0)) / max(1 - sink, 1e-9),
            contribution=contribution,
            max_head_mass=most,
            uniform=even,
        )
        for (mass, contribution), most, (begin, _), even in zip(means, largest, spans, uniform, strict=True)
    )
