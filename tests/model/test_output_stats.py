"""What is said of the distribution beside a token, by the compiled network and where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pagestream.model.network import Network
from pagestream.model.step import SamplingParams
from tests.model.observed_runs import forced
from tests.model.test_native import BASE, ISAS, LARGER, one_batch, quantized, zeros
from tests.model.test_network_matches_transformers import randomised
from tests.model.test_sampling import GREEDY, choose, chunk, filtered_probabilities, params, random_logits, sample


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


VOCABULARY = 5003  # parts, the last of which ends amid a vector


def wide_network(spread: float, poison: float = 0.0) -> Network:
    """Of pairs of tokens with equal logits."""
    config = replace(BASE, vocab_size=VOCABULARY)
    model = randomised(LlamaForCausalLM(LlamaConfig(**{**LARGER, "vocab_size": VOCABULARY})))
    head = model.lm_head.weight.data
    head *= spread
    head[1::2] = head[:-1:2]
    model.model.norm.weight.data[0] += poison
    return Network(config, quantized(model, config))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_the_compiled_summary_is_that_of_float64(isa: str, spread: float) -> None:
    asked = torch.arange(22) % 3 != 1
    batch = replace(one_batch(BASE), with_statistics=asked)
    with forced(isa):
        logits, summary, _ = wide_network(spread).outputs(batch, zeros(BASE))
    assert summary[:, 0].tolist() == logits.argmax(-1).tolist()
    assert not summary[:, 0].fmod(2).any()  # the first of each pair
    assert torch.equal(summary[:, 1], logits.amax(-1).double())
    assert not summary[~asked, 2:].any()
    exact = logits.double().numpy()[asked]
    p = np.exp(exact - exact.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    assert summary[asked, 2].tolist() == pytest.approx(entropy, abs=1e-5)
    assert summary[asked, 3].tolist() == pytest.approx(p.max(-1), rel=1e-5)
    assert summary[asked, 4].tolist() == pytest.approx([0.0] * len(p), abs=1e-12)


def test_the_margin_is_to_the_second_likeliest() -> None:
    config = replace(BASE, vocab_size=VOCABULARY)
    model = randomised(LlamaForCausalLM(LlamaConfig(**{**LARGER, "vocab_size": VOCABULARY})))
    network = Network(config, quantized(model, config))
    batch = replace(one_batch(BASE), with_statistics=torch.ones(22, dtype=torch.bool))
    logits, summary, _ = network.outputs(batch, zeros(BASE))
    first, second = logits.double().softmax(-1).topk(2).values.unbind(-1)
    assert (first - second).min() > 0
    assert summary[:, 4].tolist() == pytest.approx((first - second).tolist(), rel=1e-4)


def test_summaries_have_the_same_bits_in_any_batch_and_number_of_threads() -> None:
    network, batch = wide_network(1.0), one_batch(BASE)
    whole = replace(batch, with_statistics=torch.ones(22, dtype=torch.bool))
    before, summaries = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            summaries.append(network.outputs(whole, zeros(BASE)).summary)
            some = replace(batch, sampled_rows=torch.tensor([3, 20]), with_statistics=torch.tensor([True, True]))
            assert torch.equal(network.outputs(some, zeros(BASE)).summary, summaries[-1][[3, 20]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(summaries[0], summary) for summary in summaries)


@pytest.mark.parametrize("isa", ISAS)
def test_a_logit_that_is_not_finite_is_the_largest(isa: str) -> None:
    with forced(isa):
        summary = wide_network(1.0, poison=math.nan).outputs(one_batch(BASE), zeros(BASE)).summary
    assert not summary[:, 1].isfinite().any()
