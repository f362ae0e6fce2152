"""The cost model against machines whose cost is known: what it finds, how sure it is, how fast it learns."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import Chunk, SamplingParams
from pagestream.server.cost_model import TERMS, CostModel, Term, Work, decodes_at, prompt_from, work_of

PLANTED: Mapping[Term, float] = {
    "prefill_a": 0.004,
    "prefill_b": 4e-4,
    "prefill_c": 4e-8,
    "decode_a": 0.005,
    "decode_row": 5e-4,
    "decode_b": 6e-7,
}
LINEAR = {**PLANTED, "prefill_c": 0.0}


def cost(work: Work, terms: Mapping[Term, float] = PLANTED) -> float:
    return (
        terms["prefill_a" if work.tokens else "decode_a"]
        + terms["prefill_b"] * work.tokens
        + terms["prefill_c"] * work.squares
        + terms["decode_row"] * work.rows
        + terms["decode_b"] * work.contexts
    )


def mixed_steps(chance: random.Random) -> Iterator[Work]:
    """Of all kinds: up to eight decodes, with and without a chunk of a prompt."""
    while True:
        work = decodes_at([chance.randint(1, 8000) for _ in range(chance.choice((0, 1, 1, 2, 8)))])
        if chance.random() < 0.5 or not work.rows:
            start = chance.randint(0, 7500)
            work = work.beside(prompt_from(start, start + chance.randint(1, 512)))
        yield work


def taught(
    seed: int,
    steps: int,
    noise: float = 0.1,
    follows: float = 0.0,
    terms: Mapping[Term, float] = PLANTED,
    model: CostModel | None = None,
) -> CostModel:
    """Has seen so many steps, each off by `noise`, of which the next step keeps a share."""
    model, chance, error = model or CostModel(), random.Random(seed), 0.0
    for _, work in zip(range(steps), mixed_steps(chance), strict=False):
        error = follows * error + math.sqrt(1 - follows**2) * chance.gauss(0, noise)
        model.observe(work, 8000, cost(work, terms) * (1 + error))
    return model


def test_without_noise_it_finds_what_was_planted() -> None:
    fit = taught(1, 300, noise=0.0).fit()
    assert fit.terms.keys() == set(TERMS)
    for term, planted in PLANTED.items():
        assert fit.terms[term].value == pytest.approx(planted, rel=0.02), term
    assert fit.crossover_tokens == pytest.approx(1e4, rel=0.02)


@pytest.mark.parametrize(("steps", "follows"), [(30, 0.0), (100, 0.0), (600, 0.0), (300, 0.6)])
def test_intervals_hold_the_truth_at_least_95_times_of_100(steps: int, follows: float) -> None:
    """Over 150 runs, whether errors are independent or follow each other; 0.92 allows for the luck of 150."""
    held: Counter[str] = Counter()
    for seed in range(150):
        for term, found in taught(seed, steps, follows=follows).fit().terms.items():
            held[term] += found.lower <= PLANTED[term] <= found.upper
    assert min(held[term] for term in TERMS) >= 0.92 * 150, held


def test_intervals_are_not_wide_for_nothing() -> None:
    """After 600 steps with 10 % of noise, what matters is known to some 15 %."""
    fit = taught(3, 600).fit()
    for term in ("prefill_b", "prefill_c", "decode_a", "decode_b"):
        found = fit.terms[term]
        assert found.upper - found.lower < 0.35 * PLANTED[term], term


def test_quadratic_is_claimed_where_it_is_true_and_hardly_ever_where_it_is_not() -> None:
    assert all(taught(seed, 200).fit().crossover_tokens for seed in range(20))
    wrong = sum(taught(seed, 200, terms=LINEAR).fit().crossover_tokens is not None for seed in range(150))
    assert wrong <= 0.06 * 150


def test_nothing_is_said_of_what_was_not_seen() -> None:
    model, chance = CostModel(), random.Random(1)
    for context in range(100, 200):
        model.observe(decodes_at([context]), context, 0.01 * (1 + chance.gauss(0, 0.02)))
    fit = model.fit()
    assert set(fit.terms) == {"decode_a", "decode_row", "decode_b"}
    assert (fit.samples, fit.max_tokens) == ({"prefill": 0, "decode": 100}, {"prefill": 0, "decode": 199})
    assert not model.knows("prefill")
    # How a step's time divides between itself and its only row, nothing can have told.
    row = fit.terms["decode_row"]
    assert row.upper - row.lower > 0.002
    assert model.predict(decodes_at([150])) == pytest.approx(0.01, rel=0.02)


def test_a_machine_that_halves_its_speed_is_forecast_right_within_tens_of_steps() -> None:
    slow = {term: 2 * value for term, value in PLANTED.items()}
    model = taught(2, 60, noise=0.05, terms=slow, model=taught(1, 1000, noise=0.05))
    for _, work in zip(range(100), mixed_steps(random.Random(3)), strict=False):
        assert model.predict(work) == pytest.approx(cost(work, slow), rel=0.25)
    fit = taught(4, 2500, noise=0.05, terms=slow, model=model).fit()
    for term in ("prefill_b", "prefill_c", "decode_a", "decode_b"):
        assert fit.terms[term].value == pytest.approx(slow[term], rel=0.15)


def test_hours_of_decoding_wash_out_nothing_of_prompts() -> None:
    model = taught(1, 500)
    before = [model.fit().terms[term].value for term in ("prefill_a", "prefill_b", "prefill_c")]
    chance = random.Random(2)
    for step in range(20_000):
        work = decodes_at([500 + step % 1000])
        model.observe(work, 1500, cost(work) * (1 + chance.gauss(0, 0.05)))
    after = [model.fit().terms[term].value for term in ("prefill_a", "prefill_b", "prefill_c")]
    assert after == pytest.approx(before, rel=0.2)


def paced(seed: int, model: CostModel) -> CostModel:
    """Prompts alone, and others in chunks beside decodes that each take 60 ms, 1.3 times what their parts would."""
    chance = random.Random(seed)
    for _ in range(150):
        model.observe(decodes_at([700] * 2), 700, cost(decodes_at([700] * 2)) * (1 + chance.gauss(0, 0.1)))
        start, company = chance.randint(0, 2000), decodes_at([chance.randint(64, 2000)] * chance.choice((1, 2, 4)))
        if chance.random() < 0.3:
            work, slower = prompt_from(0, chance.choice((64, 256, 512))), 1.0
        else:
            chunks = (company.beside(prompt_from(start, start + tokens)) for tokens in range(8, 512))
            work, slower = next(work for work in chunks if 1.3 * cost(work) > 0.06), 1.3
        model.observe(work, 2500, cost(work) * slower * (1 + chance.gauss(0, 0.1)))
    return model


def test_slow_steps_beside_decodes_are_forecast_and_say_nothing_of_prompts_alone() -> None:
    held, beside = 0, decodes_at([500] * 2).beside(prompt_from(300, 380))
    for seed in range(20):
        model = paced(seed, CostModel())
        assert model.predict(prompt_from(0, 64)) == pytest.approx(cost(prompt_from(0, 64)), rel=0.25)
        assert model.predict(beside) == pytest.approx(1.3 * cost(beside), rel=0.3)
        start = model.fit().terms["prefill_a"]
        held += start.lower <= PLANTED["prefill_a"] <= start.upper
    assert held >= 18


def test_one_step_that_hung_moves_little() -> None:
    model, work = taught(1, 500, noise=0.02), prompt_from(1000, 1300)
    before = model.predict(work)
    model.observe(work, 1300, 100 * cost(work))
    assert model.predict(work) == pytest.approx(before, rel=0.15)


def test_residuals_are_actual_over_forecast() -> None:
    model = taught(1, 500, noise=0.0)
    work = decodes_at([700, 900])
    assert model.observe(work, 900, 1.5 * cost(work)) == pytest.approx(1.5, rel=0.02)
    assert CostModel().observe(work, 900, 0.01) is None


def test_chunks_of_a_prompt_cost_what_the_whole_costs() -> None:
    whole = prompt_from(0, 1000)
    parts = [prompt_from(0, 300), prompt_from(300, 301), prompt_from(301, 1000)]
    assert (sum(p.tokens for p in parts), sum(p.squares for p in parts)) == (whole.tokens, whole.squares)
    chunks = (
        Chunk("p", range(1000), 1000, 300, 200, (), SamplingParams()),
        Chunk("d", range(8), 5, 7, 3, (), SamplingParams(), proposed=(1, 2)),
    )
    assert work_of(chunks) == Work(rows=3, contexts=10, tokens=200, squares=500**2 - 300**2)


works = st.builds(
    lambda contexts, start, length: decodes_at(contexts).beside(prompt_from(start, start + length)),
    st.lists(st.integers(1, 100_000), max_size=64),
    st.integers(0, 100_000),
    st.integers(0, 8192),
).filter(lambda work: work.rows + work.tokens > 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(works, st.floats(0, 100)), max_size=60))
def test_whatever_is_seen_costs_are_finite_and_never_negative(steps: list[tuple[Work, float]]) -> None:
    model = CostModel()
    for work, seconds in steps:
        model.observe(work, 1, seconds)
        assert 0 <= model.predict(work) < math.inf
    for found in model.fit().terms.values():
        assert 0 <= found.lower <= found.value <= found.upper < math.inf
