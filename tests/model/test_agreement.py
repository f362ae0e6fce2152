"""Agreement of heads and layers, and routing, against their definitions and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.agreement import Agreement, agreement
from pagestream.model.routing import RoutingAccumulator
from pagestream.model.step import PageSummary
from tests.model.attention_oracle import divergence, entropy

Shape = tuple[int, int, int]


def random_masses(shape: Shape, seed: int, sharpness: float = 1.0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0, sharpness, shape)
    return (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).astype(np.float32)


@given(
    layers=st.integers(2, 5),
    heads=st.integers(2, 6),
    pages=st.integers(2, 40),
    page_size=st.sampled_from((16, 32, 128)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_is_the_mean_over_layers_and_block_sizes(
    layers: int, heads: int, pages: int, page_size: int, data: st.DataObject
) -> None:
    """Of what is not on the first token, renormalised; heads with next to nothing there do not count, nor layers with
    fewer than two heads that do."""
    masses = random_masses((layers, heads, pages), data.draw(st.integers(0, 99)), 2)
    rests = data.draw(st.lists(st.sampled_from((1.0, 0.3, 0.01, 5e-4, 0.0)), min_size=heads, max_size=heads))
    masses[0] *= np.array(rests, np.float32)[:, None]
    counting = [layer[layer.sum(-1) > 1e-3].astype(float) for layer in masses]
    counting = [layer / layer.sum(-1, keepdims=True) for layer in counting]
    sizes = [size // page_size for size in (16, 64, 256, 1024) if page_size <= size < pages * page_size]
    found = agreement(masses, page_size, 0)
    of_heads = [[divergence(layer, size) for layer in counting if len(layer) > 1] for size in sizes]
    means = np.array([layer.mean(0) for layer in counting if len(layer)])
    of_layers = [divergence(means, size) for size in sizes] if len(means) > 1 else []
    assert told(found, "head") == pytest.approx(np.mean(of_heads, axis=(0, 1)) if sizes else (None, None), abs=1e-5)
    assert told(found, "layer") == pytest.approx(np.mean(of_layers, axis=0) if of_layers else (None, None), abs=1e-5)


def told(found: Agreement, of: str, null: str = "") -> tuple[object, object]:
    """Divergence and coherence of `head` or `layer`."""
    return found[f"{of}_jsd{null}"], found[f"coherence_{of}s{null}"]  # type: ignore[literal-required]


@pytest.mark.parametrize("of", ["head", "layer"])
def test_the_null_turns_each_member_in_a_circle_by_chance(of: str) -> None:
    """Of two members their divergence at one of the distances between them, not always the same one."""
    distances = []
    for pages in range(5, 20):
        masses = random_masses((1, 2, pages) if of == "head" else (2, 1, pages), pages, 2)
        one, other = masses.reshape(2, pages).astype(float)
        turned = [divergence(np.array([one, np.roll(other, by)]), 1) for by in range(pages)]
        null = told(agreement(masses, 1024, 0), of, "_null")
        (distance,) = (by for by in range(pages) if turned[by] == pytest.approx(null, abs=1e-6))
        distances.append(min(distance, pages - distance))
    assert len(set(distances)) > 2


@pytest.mark.parametrize("of", ["head", "layer"])
def test_nulls_of_few_members_over_two_blocks_are_half_turned_and_half_not(of: str) -> None:
    """Two members that look at the same of two blocks agree wholly, or not at all once one of them is turned."""
    masses = np.broadcast_to(np.array([1, 0], np.float32), (1, 2, 2) if of == "head" else (2, 1, 2))
    nulls = [told(agreement(masses, 1024, context), of, "_null")[1] for context in range(1025, 1089)]
    assert {round(null, 6) for null in nulls} == {0.0, 1.0}  # type: ignore[call-overload]
    assert 16 < sum(nulls) < 48  # type: ignore[arg-type]


def test_equal_heads_agree_and_disjoint_heads_do_not() -> None:
    equal = np.broadcast_to(random_masses((1, 1, 4), 0), (3, 4, 4))
    found = agreement(equal, 1024, 0)
    assert found["head_jsd"] == pytest.approx(0, abs=1e-6)
    assert found["coherence_heads"] == pytest.approx(1, abs=1e-6)
    disjoint = agreement(np.broadcast_to(np.eye(4, dtype=np.float32), (3, 4, 4)), 1024, 0)
    assert disjoint["head_jsd"] == pytest.approx(math.log(4), abs=1e-6)
    assert disjoint["coherence_heads"] == pytest.approx(0, abs=1e-6)
    assert disjoint["coherence_layers"] == pytest.approx(1, abs=1e-6)


def test_heads_that_look_at_one_place_agree_more_than_their_null_and_independent_ones_do_not() -> None:
    focused = random_masses((4, 1, 64), 1, 3).repeat(9, axis=1)
    found = agreement(focused, 256, 0)
    assert found["coherence_heads"] > found["coherence_heads_null"] + 0.2  # type: ignore[operator]
    independent = agreement(random_masses((8, 9, 64), 2, 3), 256, 0)
    assert independent["coherence_heads"] == pytest.approx(independent["coherence_heads_null"], abs=0.05)


def test_without_blocks_or_members_to_compare_there_is_nothing_to_say() -> None:
    assert set(agreement(random_masses((3, 4, 1), 0), 16, 0).values()) == {None}
    one_head = agreement(random_masses((3, 1, 8), 0), 16, 0)
    assert one_head["head_jsd"] is None
    assert one_head["layer_jsd"] is not None
    assert agreement(np.zeros((3, 4, 8), np.float32), 16, 0)["coherence_heads"] is None  # all on the first token


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
