"""What mathematics says about softmax attention whatever the inputs: no reference implementation takes part."""

from __future__ import annotations

import numpy as np
import torch


def attend_once(attend, helpers, query, keys, values, **options):
    """One query row per entry of `query` [t, D], each over all of `keys`, `values` [n, D]; stats [t, 5], out [t, D]."""
    rows = [row[None, None] for row in query]
    batch = helpers.pack(rows, [keys[:, None]] * len(rows), [values[:, None]] * len(rows), **options)
    result = attend(batch)
    return result.out[:, 0], result.stats[:, 0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_order_of_keys_does_not_matter(attend, helpers):
    q, k, v = normal(4, 64), normal(700, 64, seed=1), normal(700, 64, seed=2)
    order = torch.randperm(700)
    (out, stats), (out2, stats2) = (attend_once(attend, helpers, q, k[i], v[i]) for i in (torch.arange(700), order))
    helpers.compare("out", out2, out, 1e-5)
    helpers.compare("lse, entropy, p_max", stats2[:, :3], stats[:, :3], 1e-5)


def test_output_is_the_minimum_of_the_weighted_square_loss(attend, helpers):
    """sum_j p_j (v_j - o) = 0 with p read through one-hot values."""
    q, k, v = normal(3, 64), normal(64, 64, seed=1), normal(64, 64, seed=2)
    out, _ = attend_once(attend, helpers, q, k, v)
    weights, _ = attend_once(attend, helpers, q, k, torch.eye(64))
    helpers.compare("weights sum", weights.double().sum(-1), np.ones(3), 1e-6)
    helpers.compare("gradient", weights.double() @ v.double() - out.double(), np.zeros((3, 64)), 1e-5)
    assert (out <= v.amax(0) + 1e-5).all()
    assert (out >= v.amin(0) - 1e-5).all()


def test_hopfield_recall(attend, helpers):
    """One update from a noisy pattern: diluted at attention's own temperature, exact at a lower one."""
    patterns = normal(256, 64)
    patterns *= 8 / patterns.norm(dim=-1, keepdim=True)
    noisy = patterns[:32] + 0.5 * normal(32, 64, seed=1)
    errors = []
    for scale in (0.125, 0.5, 1.0):
        out, _ = attend_once(attend, helpers, noisy, patterns, patterns, scale=scale)
        errors.append(((out - patterns[:32]).norm(dim=-1) / 8).mean().item())
    assert 0.05 < errors[0] < 0.3
    assert errors[1] < 1e-3
    assert errors[2] < 1e-5


def test_dead_keys_change_nothing(attend, helpers):
    """A key with a score near -1e4 and a value of 1e30, in the middle and at the end, where it moves no other key."""
    q, k, v = normal(2, 64), normal(129, 64, seed=1), normal(129, 64, seed=2)
    q[:, 0], k[:, 0] = 8, 0
    out, stats = attend_once(attend, helpers, q, k[:-1], v[:-1])
    k[128], v[128] = 0, 1e30
    k[128, 0] = -1e4
    out2, stats2 = attend_once(attend, helpers, q, k, v)
    helpers.compare("out", out2, out, 0)
    helpers.compare("lse, entropy, p_max", stats2[:, :3], stats[:, :3], 0)


def test_duplicating_every_key_adds_log_r_to_the_entropy(attend, helpers):
    q, k, v = normal(3, 64), normal(200, 64, seed=1), normal(200, 64, seed=2)
    out, stats = attend_once(attend, helpers, q, k, v)
    out3, stats3 = attend_once(attend, helpers, q, k.repeat(3, 1), v.repeat(3, 1))
    helpers.compare("out", out3, out, 1e-5)
    helpers.compare("entropy", stats3[:, 1] - stats[:, 1], np.full(3, np.log(3)), 1e-5)
    helpers.compare("lse", stats3[:, 0] - stats[:, 0], np.full(3, np.log(3)), 1e-5)


def test_gaussian_scores_have_entropy_log_n_minus_half(attend, helpers):
    _, stats = attend_once(attend, helpers, normal(16, 64), normal(8192, 64, seed=1), normal(8192, 64, seed=2))
    assert abs(stats[:, 1].mean().item() - (np.log(8192) - 0.5)) < 0.1


def test_two_keys_have_the_closed_form(attend, helpers):
    for gap in (0.0, 0.5, 3.0, 20.0, 200.0):
        keys = torch.zeros(2, 16)
        keys[1, 0] = gap
        q = torch.zeros(1, 16)
        q[0, 0] = 1
        _, stats = attend_once(attend, helpers, q, keys, normal(2, 16), scale=1.0)
        p = 1 / (1 + np.exp(-gap))
        entropy = -p * np.log(p) - ((1 - p) * np.log(1 - p) if p < 1 else 0)
        helpers.compare(f"gap {gap}", stats[0], [gap + np.log1p(np.exp(-gap)), entropy, p, 1, 1], 1e-6 * max(1, gap))


def test_entropy_bounds(attend, helpers):
    """H lies between -log p_max and log n for every row, sharp or flat."""
    for scale in (0.0, 0.05, 0.5, 2.0, 30.0):
        _, stats = attend_once(attend, helpers, normal(8, 64), normal(500, 64, seed=1), normal(500, 64), scale=scale)
        assert (stats[:, 1] <= np.log(500) + 1e-5).all()
        assert (stats[:, 1] >= -stats[:, 2].log() - 1e-5).all()


def test_temperature_slope_is_minus_varentropy(attend, helpers):
    """The derivative dH / d log beta is -Var(log p), by a central difference."""
    q, k, v, e = normal(4, 64), normal(300, 64, seed=1), normal(300, 64, seed=2), 1e-2
    (_, above), (_, below) = (attend_once(attend, helpers, q, k, v, scale=0.125 * (1 + x)) for x in (e, -e))
    slope = (above[:, 1] - below[:, 1]).double() / (2 * e)
    log_p = torch.log_softmax(0.125 * q.double() @ k.double().T, -1)
    mean = (log_p.exp() * log_p).sum(-1, keepdim=True)
    varentropy = (log_p.exp() * (log_p - mean) ** 2).sum(-1)
    helpers.compare("slope", slope, -varentropy, 1e-2 * varentropy.numpy())


def test_odd_part_of_small_scores_is_a_gradient_step(attend, helpers):
    """[A(eps q) - A(-eps q)] / 2 eps is the mean of v_j (s_j - mean s), one step of gradient descent on in-context
    data, with an error that falls as eps squared."""
    q, k, v = normal(3, 64), normal(200, 64, seed=1), normal(200, 64, seed=2)
    scores = 0.125 * q.double() @ k.double().T
    expected = (scores - scores.mean(-1, keepdim=True)) @ v.double() / 200
    errors = []
    for eps in (1e-1, 1e-2):
        (plus, _), (minus, _) = (attend_once(attend, helpers, sign * eps * q, k, v) for sign in (1, -1))
        errors.append(((plus.double() - minus.double()) / (2 * eps) - expected).abs().max() / expected.abs().max())
    assert errors[1] < 1e-2
    assert 50 < errors[0] / errors[1] < 200
