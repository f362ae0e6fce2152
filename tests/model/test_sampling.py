from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagestream.kernels.outputs import Outputs, summarize
from pagestream.model import sampling as module
from pagestream.model.sampling import BLOCK, NonFiniteLogitsError, draw, filtered_weights
from pagestream.model.step import Chunk, SampledToken, SamplingParams

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=1.0)


def chunk(sampling: SamplingParams, tokens: list[int] | None = None, num_prompt: int = 1, name: str = "a") -> Chunk:
    tokens = tokens or [0]
    return Chunk(name, tokens, num_prompt, 0, len(tokens), [0], sampling)


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (rows, vocabulary)).astype(np.float32))


def filtered_probabilities(logits: torch.Tensor, rows: Sequence[SamplingParams]) -> torch.Tensor:
    weights = filtered_weights(logits, rows)[:, : logits.shape[-1]]
    return weights / weights.sum(dim=-1, keepdim=True)


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[SampledToken]:
    asked = [chunk.output_stats for chunk in chunks for _ in chunk.sampled_positions]
    return module.sample(Outputs(logits, summarize(logits, torch.tensor(asked, dtype=torch.bool))), chunks)


def choose(logits: torch.Tensor, *chunks: Chunk) -> list[int]:
    return [token.token_id for token in sample(logits, chunks)]


params = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 3000),
    top_p=st.just(1.0) | st.floats(0.01, 0.999),
    min_p=st.just(0.0) | st.floats(0.001, 1.0),
)


@given(st.lists(params, min_size=1, max_size=4), st.integers(0, 1000), st.sampled_from([5, 300, 3000]))
@settings(max_examples=60, deadline=None)
def test_filtered_distribution_is_that_of_transformers(rows: list[SamplingParams], seed: int, vocabulary: int) -> None:
    """Also on flat logits, where top-p must look at all tokens."""
    logits = random_logits(len(rows), vocabulary, seed, spread=(seed % 4) + 0.01)
    ours = filtered_probabilities(logits, rows)
    for row, p in enumerate(rows):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
        if p.top_k is not None:
            warpers.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1:
            warpers.append(TopPLogitsWarper(p.top_p))
        if p.min_p > 0:
            warpers.append(MinPLogitsWarper(p.min_p))
        scores = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[row : row + 1].double())
        theirs = scores.softmax(dim=-1)[0].float()
        # A sum of probabilities in fp32 may put the one token at the edge of top-p, or min-p, on the other side.
        edge = (ours[row] > 0) != (theirs > 0)
        assert edge.sum() <= 1
        bound = 1e-5 + float(theirs.max() if edge.any() else 0) * 1e-2
        torch.testing.assert_close(ours[row][~edge], theirs[~edge], atol=bound, rtol=1e-3 if edge.any() else 1e-4)


@pytest.mark.parametrize("top_p", [0.001, 0.03, 0.5, 0.99])
def test_the_nucleus_may_be_of_any_width(top_p: float) -> None:
    flat = torch.linspace(0, 1e-3, 10_000)[None].expand(2, -1)
    rows = [replace(WARM, top_p=0.0001), replace(WARM, top_p=top_p)]
    kept = (filtered_probabilities(flat, rows) > 0).sum(dim=-1).tolist()
    assert kept == pytest.approx([1, top_p * 10_000], rel=1e-2, abs=1)


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for sampling in (replace(WARM, top_k=2), replace(WARM, top_p=0.6)):
        assert (filtered_probabilities(logits, [sampling])[0] > 0).tolist() == [False, True, True, True, False]


@given(st.data(), st.floats(0.1, 10))
@settings(deadline=None)
def test_repetition_penalty_is_that_of_transformers(data: st.DataObject, penalty: float) -> None:
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    logits = random_logits(1, 10, data.draw(st.integers(0, 99)))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    sampling = SamplingParams(repetition_penalty=penalty)
    num_prompt = data.draw(st.integers(1, len(tokens)))
    assert choose(logits, chunk(sampling, tokens, num_prompt)) == [int(theirs.argmax())]


@given(st.data())
@settings(deadline=None)
def test_bias_then_penalties_then_suppression(data: st.DataObject) -> None:
    """Against a loop over the vocabulary; the best token is compared by its score, so ties are no failure."""
    vocabulary = 8
    tokens = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=12))
    num_prompt = data.draw(st.integers(1, len(tokens)))
    sampling = SamplingParams(
        repetition_penalty=data.draw(st.sampled_from([1.0, 0.5, 3.0])),
        presence_penalty=data.draw(st.sampled_from([0.0, -1.5, 2.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, -0.75, 1.0])),
        logit_bias=data.draw(st.dictionaries(st.integers(0, vocabulary - 1), st.floats(-5, 5), max_size=3)),
        min_tokens=data.draw(st.integers(0, 8)),
        suppressed_until_min_tokens=frozenset(data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=3))),
    )
    logits = random_logits(1, vocabulary, data.draw(st.integers(0, 99)))
    expected = []
    for token in range(vocabulary):
        score = float(logits[0, token]) + sampling.logit_bias.get(token, 0.0)
        if token in tokens:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        count = tokens[num_prompt:].count(token)
        score -= sampling.frequency_penalty * count + (sampling.presence_penalty if count else 0.0)
        if len(tokens) - num_prompt < sampling.min_tokens and token in sampling.suppressed_until_min_tokens:
            score = -math.inf
        expected.append(score)
    (chosen,) = choose(logits, chunk(sampling, tokens, num_prompt))
    assert expected[chosen] == pytest.approx(max(expected), abs=1e-4)


@pytest.mark.parametrize(("num_output", "expected"), [(0, 1), (1, 1), (2, 0), (3, 0)])
def test_end_tokens_are_possible_from_min_tokens_on(num_output: int, expected: int) -> None:
    sampling = SamplingParams(min_tokens=2, suppressed_until_min_tokens=frozenset({0}))
    assert choose(torch.tensor([[2.0, 1.0]]), chunk(sampling, [1] * (3 + num_output), num_prompt=3)) == [expected]


def test_adjusting_one_row_leaves_the_logits_and_the_other_rows() -> None:
    logits = random_logits(2, 50)
    before = logits.clone()
    best = logits.argmax(dim=-1).tolist()
    banned = replace(GREEDY, logit_bias={best[0]: -100.0})
    chosen = choose(logits, chunk(banned), chunk(GREEDY))
    assert chosen[0] != best[0]
    assert chosen[1] == best[1]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "sampling",
    [
        WARM,
        replace(WARM, temperature=0.7, top_k=5),
        replace(WARM, temperature=1.5, top_p=0.8),
        replace(WARM, min_p=0.1, logit_bias={3: 1.0}),
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_frequencies_are_the_probabilities(sampling: SamplingParams, varied: str) -> None:
    """Chi-square over 4,000 seeds, and over 4,000 positions of one seed: each must look like independent draws."""
    logits = random_logits(1, 20, spread=1.5)
    biased = logits.double().numpy()[0]
    for token, bias in sampling.logit_bias.items():
        biased[token] += bias
    scores = np.sort(biased / sampling.temperature)
    floor = scores[-(sampling.top_k or len(scores))]
    weights = np.exp(biased / sampling.temperature) * (biased / sampling.temperature >= floor)
    weights /= weights.sum()
    likelier = np.array([weights[weights > weight].sum() for weight in weights])
    weights *= (likelier < sampling.top_p) & (weights >= sampling.min_p * weights.max())
    weights /= weights.sum()

    draws, batch = 4000, 100
    observed: Counter[int] = Counter()
    for first in range(0, draws, batch):
        numbers = range(first, first + batch)
        if varied == "seed":
            chunks = [chunk(replace(sampling, seed=number)) for number in numbers]
        else:
            chunks = [chunk(sampling, [0] * (number + 1)) for number in numbers]
        observed.update(choose(logits.expand(batch, -1), *chunks))
    assert {token for token in observed if weights[token] == 0} == set()
    cells = weights * draws
    chi_square = sum((observed[token] - cell) ** 2 / cell for token, cell in enumerate(cells) if cell > 0)
    degrees = int((cells > 0).sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


mixed = st.one_of(
    st.just(GREEDY),
    st.builds(SamplingParams, temperature=st.floats(0.1, 2), seed=st.integers(0, 2**64 - 1)),
    params.flatmap(lambda p: st.builds(replace, st.just(p), seed=st.integers(0, 2**64 - 1))),
    st.just(SamplingParams(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=3)),
)


@given(st.lists(mixed, min_size=2, max_size=6), st.integers(0, 99), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_row_does_not_depend_on_its_batch(rows: list[SamplingParams], seed: int, random: object) -> None:
    logits = random_logits(len(rows), 2000, seed)
    chunks = [chunk(sampling, [5, 6, 7, 5][: 1 + row % 4]) for row, sampling in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    together = sample(logits[order], [chunks[row] for row in order])
    for place, row in enumerate(order):
        (alone,) = sample(logits[row : row + 1], [chunks[row]])
        assert together[place].token_id == alone.token_id
        assert together[place].logprob == pytest.approx(alone.logprob, abs=1e-6)


def test_the_ends_of_the_uniform_range_draw_the_outermost_possible_tokens() -> None:
    """Tokens filtered out at either end of the vocabulary must stay out, whatever the total rounds to."""
    for seed in range(100):
        weights = random_logits(1, 16 * BLOCK, seed).exp()
        weights[:, :3] = weights[:, -3:] = 0
        assert draw(weights.expand(2, -1), [0.0, 1 - 2**-52]) == [3, 16 * BLOCK - 4]


@given(st.integers(0, 99), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
@settings(deadline=None)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(seed: int, uniform: float, dropped: float) -> None:
    """Against a running sum over the whole vocabulary."""
    random = np.random.default_rng(seed)
    weights = random.random(40 * BLOCK) * (random.random(40 * BLOCK) >= dropped)
    weights[random.integers(len(weights))] = 1
    cumulative = weights.astype(np.float32).astype(np.float64).cumsum()
    (token_id,) = draw(torch.from_numpy(weights.astype(np.float32))[None], [uniform])
    assert weights[token_id] > 0
    below = cumulative[token_id - 1] if token_id else 0.0
    slack = 1e-6 * cumulative[-1]
    assert below - slack <= uniform * cumulative[-1] <= cumulative[token_id] + slack


def test_seed_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(64, 10_000)
    by_seed = choose(logits, *(chunk(replace(WARM, seed=seed)) for seed in range(64)))
    by_position = choose(logits, *(chunk(WARM, [0] * (position + 1)) for position in range(64)))
    assert len(set(by_seed)) > 55
    assert len(set(by_position)) > 55


@given(st.floats(min_value=2**-149, max_value=100, width=32), st.integers(0, 50))
@settings(deadline=None)
def test_any_temperature_gives_a_possible_token(temperature: float, seed: int) -> None:
    logits = random_logits(1, 50, seed, spread=30)
    (token,) = choose(logits, chunk(SamplingParams(temperature=temperature, seed=seed)))
    assert 0 <= token < 50
    if temperature < 1e-6:
        assert token == int(logits.argmax())


def test_top_k_1_is_greedy_even_between_equal_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0]]).expand(50, -1)
    assert set(choose(logits, *(chunk(replace(WARM, top_k=1, seed=seed)) for seed in range(50)))) == {1}


@given(st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 99))
@settings(deadline=None)
def test_logprobs_are_of_the_models_own_distribution(asked: list[int | None], seed: int) -> None:
    """Whatever the sampling settings; more are asked for than there are tokens in one case."""
    logits = random_logits(len(asked), 10, seed)
    settings_ = {"temperature": 0.5, "top_k": 4, "logit_bias": {2: 50.0}, "repetition_penalty": 2.0}
    chunks = [chunk(SamplingParams(logprobs=n, seed=seed, **settings_), [2, 3]) for n in asked]  # type: ignore[arg-type]
    for row, (n, token) in enumerate(zip(asked, sample(logits, chunks), strict=True)):
        if n is None:
            assert token == SampledToken(token.token_id)
            continue
        exact = logits[row].double().numpy()
        exact = exact - np.log(np.exp(exact).sum())
        assert token.logprob == pytest.approx(exact[token.token_id], abs=1e-5)
        best = np.argsort(-exact)[:n]
        assert [token_id for token_id, _ in token.top_logprobs] == best.tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(exact[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, WARM, replace(GREEDY, presence_penalty=1.0)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(sampling: SamplingParams, poison: float) -> None:
    logits = random_logits(3, 20)
    logits[1, 7] = poison
    with pytest.raises(NonFiniteLogitsError) as caught:
        sample(logits, [chunk(sampling, name=name) for name in ("first", "second", "third")])
    assert caught.value.request_id == "second"
    assert len(sample(logits[[0, 2]], [chunk(sampling), chunk(sampling)])) == 2


def test_nothing_left_to_choose_is_named() -> None:
    sampling = SamplingParams(min_tokens=1, suppressed_until_min_tokens=frozenset(range(4)))
    with pytest.raises(NonFiniteLogitsError, match="only"):
        sample(torch.zeros(1, 4), [chunk(sampling, name="only")])
    with pytest.raises(NonFiniteLogitsError, match="only"):
        sample(torch.full((1, 4), -math.inf), [chunk(WARM, name="only")])


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), []) == []
