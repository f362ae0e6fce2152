"""What is said of the distribution beside a token."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.sampling import sample
from pagestream.model.step import SamplingParams
from tests.model.test_sampling import GREEDY, choose, chunk, filtered_probabilities, params, random_logits


@given(st.lists(params | st.just(GREEDY), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from([2, 10, 3000]))
@settings(max_examples=40, deadline=None)
def test_output_statistics_are_those_of_float64(rows: list[SamplingParams], seed: int, vocabulary: int) -> None:
    """Of raw logits, whatever the settings; the sampling surprisal is of the distribution that was drawn from."""
    logits = random_logits(len(rows), vocabulary, seed, spread=(seed % 4) + 0.01)
    biased = [replace(row, logit_bias={1: 0.5}, seed=seed) for row in rows]
    asked = [replace(chunk(row), output_stats=index % 3 != 2) for index, row in enumerate(biased)]
    tokens = sample(logits, asked)
    assert [t.token_id for t in tokens] == choose(logits, *(chunk(row) for row in biased))
    adjusted = logits.clone()
    adjusted[:, 1] += 0.5
    for index, token in enumerate(tokens):
        if index % 3 == 2:
            assert token.output is None
            continue
        exact = logits[index].double().numpy()
        p = np.exp(exact - exact.max())
        p /= p.sum()
        likeliest = np.sort(p)[::-1]
        of_drawn = 0.0
        if biased[index].temperature > 0 and biased[index].top_k != 1:
            drawn_from = filtered_probabilities(adjusted[index : index + 1], [biased[index]]).double()
            of_drawn = -math.log(drawn_from[0, token.token_id])
        assert token.output is not None
        assert token.output.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        assert token.output.top1 == pytest.approx(likeliest[0], abs=1e-5)
        assert token.output.margin == pytest.approx(likeliest[0] - likeliest[1], abs=1e-5)
        assert token.output.surprisal == pytest.approx(-math.log(p[token.token_id]), abs=1e-4)
        assert token.output.sampling_surprisal == pytest.approx(of_drawn, abs=1e-4)
