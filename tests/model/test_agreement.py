"""Agreement of heads and layers, and routing, against their definitions and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.agreement import agreement
from pagestream.model.routing import RoutingAccumulator
from pagestream.model.step import PageSummary

Shape = tuple[int, int, int]


def random_masses(shape: Shape, seed: int, sharpness: float = 1.0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0, sharpness, shape)
    return (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).astype(np.float32)


def entropy(p: np.ndarray) -> float:
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


def brute_force(members: np.ndarray, blocks_of: int) -> tuple[float, float]:
    """Divergence and coherence of [members, pages] in blocks of so many pages."""
    starts = range(0, members.shape[1], blocks_of)
    blocks = np.array([[p[start : start + blocks_of].sum() for start in starts] for p in members.astype(float)])
    blocks /= blocks.sum(-1, keepdims=True)
    jsd = entropy(blocks.mean(0)) - float(np.mean([entropy(p) for p in blocks]))
    return jsd, 1 - jsd / math.log(min(blocks.shape))


@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 40), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_is_the_mean_over_layers_and_block_sizes(layers: int, heads: int, pages: int, seed: int) -> None:
    masses = random_masses((layers, heads, pages), seed, 2)
    sizes = [size // 16 for size in (16, 64, 256, 1024) if pages * 16 > size]
    found = agreement(masses, 16)
    of_heads = np.mean([[brute_force(layer, size) for layer in masses] for size in sizes], axis=(0, 1))
    of_layers = np.mean([brute_force(masses.mean(1), size) for size in sizes], axis=0)
    assert (found["head_jsd"], found["coherence_heads"]) == pytest.approx(of_heads, abs=1e-5)
    assert (found["layer_jsd"], found["coherence_layers"]) == pytest.approx(of_layers, abs=1e-5)


def test_equal_heads_agree_and_disjoint_heads_do_not() -> None:
    equal = np.broadcast_to(random_masses((1, 1, 4), 0), (3, 4, 4))
    found = agreement(equal, 1024)
    assert found["head_jsd"] == pytest.approx(0, abs=1e-6)
    assert found["coherence_heads"] == pytest.approx(1, abs=1e-6)
    disjoint = agreement(np.broadcast_to(np.eye(4, dtype=np.float32), (3, 4, 4)), 1024)
    assert disjoint["head_jsd"] == pytest.approx(math.log(4), abs=1e-6)
    assert disjoint["coherence_heads"] == pytest.approx(0, abs=1e-6)
    assert disjoint["coherence_layers"] == pytest.approx(1, abs=1e-6)


def test_heads_that_look_at_one_place_agree_more_than_their_null_and_independent_ones_do_not() -> None:
    focused = random_masses((4, 1, 64), 1, 3).repeat(9, axis=1)
    found = agreement(focused, 256)
    assert found["coherence_heads"] > found["coherence_heads_null"] + 0.2  # type: ignore[operator]
    independent = agreement(random_masses((8, 9, 64), 2, 3), 256)
    assert independent["coherence_heads"] == pytest.approx(independent["coherence_heads_null"], abs=0.05)


def test_without_blocks_or_members_to_compare_there_is_nothing_to_say() -> None:
    assert set(agreement(random_masses((3, 4, 1), 0), 16).values()) == {None}
    one_head = agreement(random_masses((3, 1, 8), 0), 16)
    assert one_head["head_jsd"] is None
    assert one_head["layer_jsd"] is not None
    assert agreement(np.zeros((3, 4, 8), np.float32), 16)["coherence_heads"] is None  # all on the first token


def summary_of(masses: np.ndarray) -> PageSummary:
    """Of [heads, pages]."""
    mean_entropy = float(np.mean([entropy(p) for p in masses]))
    nothing = (None,) * 8
    return PageSummary(tuple(masses.mean(0)), mean_entropy, 1.0, *nothing, (), masses.tobytes())


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_routing_is_the_information_that_the_step_has_about_the_page(steps: int, heads: int, seed: int) -> None:
    """As a sum over steps and pages of the joint distribution; the context grows by a page a step."""
    routing, last = RoutingAccumulator(), steps + 1
    joint = np.zeros((heads, steps, last))
    for step in range(steps):
        masses = random_masses((1, heads, step + 2), seed + step, 2)[0]
        joint[:, step, : step + 2] = masses / steps
        assert routing.routing() is None or step > 1
        routing.add(summary_of(masses))
    exact = 0.0
    for head in joint:
        marginal = head.sum(1, keepdims=True) * head.sum(0)
        exact += float(sum(p * math.log(p / q) for p, q in zip(head.flat, marginal.flat, strict=True) if p > 0))
    assert routing.routing() == pytest.approx(exact / heads, abs=1e-5)
    assert routing.steps == steps


def test_a_head_that_always_looks_at_the_same_pages_routes_nothing() -> None:
    routing = RoutingAccumulator()
    for _ in range(3):
        routing.add(summary_of(random_masses((1, 2, 5), 0)[0]))
    assert routing.routing() == pytest.approx(0, abs=1e-6)
