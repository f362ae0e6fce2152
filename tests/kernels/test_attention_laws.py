"""What mathematics says about softmax attention whatever the inputs, for every kernel that this machine can run, the
CUDA kernels' source among them. T1 and so on are the numbers of these laws in kernels/README.md.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.laws import ENTROPY, LSE, P_MAX, RECENT, SINK, divergence, entropy, normal, weights
from tests.kernels.oracle import compare

any_inputs = settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def triple(kernel, rows, n, size=64, seed=0):
    return tuple(kernel.round(normal(count, size, seed=seed + i)) for i, count in enumerate((rows, n, n)))


@any_inputs
@given(
    n=st.sampled_from((1, 2, 15, 16, 17, 257, 4096)),
    size=st.sampled_from((64, 80, 128)),
    rows=st.sampled_from((1, 3, 4, 8)),
    sharpness=st.sampled_from((0.0, 0.5, 2.0, 8.0, 30.0)),
    sink=st.booleans(),
    seed=st.integers(0, 99),
)
def test_t1_it_is_kernel_regression(kernel, n, size, rows, sharpness, sink, seed):
    """O = sum K(q, k_j) v_j / sum K(q, k_j) with K = exp(scale <q, k>)."""
    n = min(n, kernel.size(n, 257))
    q, k, v = triple(kernel, rows, n, size, seed)
    scale = sharpness * size**-0.5
    if sink and sharpness:
        q[:, -1], k[:, -1] = 4, 0
        k[0, -1] = 3 / scale  # 12 above the others
        q, k = kernel.round(q), kernel.round(k)
    seen, p = kernel(q, k, v, scale=scale), weights(q, k, scale)
    kernel.check_out(seen.out, p @ v.double().numpy(), v)
    kernel.check_stats(seen.stats[:, ENTROPY], entropy(p))


def test_t2_the_output_minimises_the_weighted_square_loss(kernel):
    q, k, v = triple(kernel, 3, 300)
    p, o = weights(q, k), kernel(q, k, v).out
    gradient = np.einsum("tn,tnd->td", p, v.double().numpy() - o[:, None])
    kernel.check_out(gradient, np.zeros_like(gradient), v)


def test_t3_keys_are_a_set_and_rows_are_independent(kernel):
    q, k, v = triple(kernel, 4, kernel.size(700, 200))
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))
    seen, shuffled = kernel(q, k, v), kernel(q, k[order], v[order])
    kernel.check_out(shuffled.out, seen.out, v)
    kernel.check_stats(shuffled.stats[:, :SINK], seen.stats[:, :SINK])
    other_rows = kernel(q[[2, 0, 3, 1]], k, v)
    assert np.array_equal(other_rows.out, seen.out[[2, 0, 3, 1]])
    assert np.array_equal(other_rows.stats, seen.stats[[2, 0, 3, 1]])


@pytest.mark.parametrize("beta", [64**-0.5, 0.5, 1.0])
def test_t4_hopfield_update(kernel, beta):
    """With values equal to the keys it is the update of a modern Hopfield network, X softmax(beta X q)."""
    patterns, noise = kernel.round(normal(120, 64)), normal(4, 64, seed=1)
    q = kernel.round(patterns[:4] + 0.5 * noise)
    seen = kernel(q, patterns, patterns, scale=beta)
    kernel.check_out(seen.out, weights(q, patterns, beta) @ patterns.double().numpy(), patterns)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_t5_stored_patterns_are_nearly_fixed_points(kernel, beta):
    """|f(x_i) - x_i| <= 2 max |x| (N - 1) exp(-beta gap_i), gap_i = <x_i, x_i> - the largest other <x_i, x_j>."""
    x = kernel.round(normal(256, 64))
    rows = slice(kernel.size(256, 32))
    products = (x.double() @ x.double().T).numpy()
    gap = np.diag(products) - np.where(np.eye(256, dtype=bool), -np.inf, products).max(-1)
    bound = 2 * float(x.norm(dim=-1).max()) * 255 * np.exp(-beta * gap[rows])
    moved = np.linalg.norm(kernel(x[rows], x, x, scale=beta).out - x[rows].double().numpy(), axis=-1)
    rounding = 1e-5 if kernel.is_exact else 2**-8
    assert (moved <= bound + rounding * float(x.norm(dim=-1).max())).all()


def test_t6_recall_and_the_limits_of_temperature(kernel):
    """One update from a noisy pattern: diluted at attention's own temperature, exact at a lower one."""
    x = normal(256, 64)
    x = kernel.round(x * (8 / x.norm(dim=-1, keepdim=True)))
    rows = slice(kernel.size(64, 16))
    noisy = kernel.round(x[rows] + 0.5 * normal(256, 64, seed=1)[rows])

    def error(scale):
        out = kernel(noisy, x, x, scale=scale).out
        return (np.linalg.norm(out - x[rows].double().numpy(), axis=-1) / 8).mean()

    rounding = 0.0 if kernel.is_exact else 2**-8
    assert 0.05 < error(0.125) < 0.3
    assert error(0.5) < 1e-3 + rounding
    assert error(1.0) < 1e-5 + rounding
    v = kernel.round(normal(256, 64, seed=2))
    kernel.check_out(kernel(noisy, x, v, scale=1e4).out, v[rows].double().numpy(), v)
    flat = kernel(noisy, x, v, scale=0.0)
    kernel.check_out(flat.out, np.broadcast_to(v.double().mean(0).numpy(), flat.out.shape), v)
    compare("entropy", flat.stats[:, ENTROPY], np.full(len(flat.stats), np.log(256)), 1e-5)


def test_t7_the_output_lies_between_the_values(kernel):
    q, k, v = triple(kernel, 8, 200)
    out, slack = kernel(q, k, v).out, (5e-5 if kernel.is_exact else 2**-8) * float(v.abs().max())
    assert (out <= v.amax(0).double().numpy() + slack).all()
    assert (out >= v.amin(0).double().numpy() - slack).all()
    ones = kernel(q, k, torch.ones_like(v)).out
    compare("weights sum to one", ones, np.ones_like(ones), 5e-5 if kernel.is_exact else 2**-8)
    for first in (0, 64, 128):  # one-hot values return the weights themselves
        one_hot = torch.zeros(200, 64)
        one_hot[first : first + 64] = torch.eye(64)
        kernel.check_out(kernel(q, k, one_hot).out, weights(q, k)[:, first : first + 64], one_hot)


@pytest.mark.parametrize("offset", [200.0, -200.0])
def test_t8_a_constant_added_to_all_scores_moves_only_their_sum(kernel, offset):
    q, k, v = triple(kernel, 4, 300)
    k[:, -1] = 1
    q[:, -1] = 0
    plain = kernel(q, k, v)
    q[:, -1] = offset * 8
    seen = kernel(q, k, v)
    kernel.check_out(seen.out, plain.out, v)
    kernel.check_stats(seen.stats[:, ENTROPY:SINK], plain.stats[:, ENTROPY:SINK])
    kernel.check_stats(seen.stats[:, LSE] - offset, plain.stats[:, LSE])


def test_t9_dead_keys_change_nothing(kernel):
    """A key with a score near -1e4 and a value of 1e30 at the end, where it moves no other key: no bit changes."""
    q, k, v = triple(kernel, 2, kernel.size(129, 91))  # 129: the first of a tile, which would move a GPU's splits
    q[:, 0], k[:, 0] = 8, 0
    without = kernel(q, k[:-1], v[:-1])
    k[-1], v[-1] = 0, 1e30
    k[-1, 0] = -1e4
    seen = kernel(q, k, v)
    assert np.array_equal(seen.out, without.out)
    assert np.array_equal(seen.stats[:, :SINK], without.stats[:, :SINK])


def test_t10_what_belongs_to_nobody_is_never_read(kernel):
    """Slots beyond the sequence and pages of nobody hold NaN in every test here; with numbers there, the same bits."""
    query, keys, values = (normal(*shape, seed=i).to(kernel.dtype) for i, shape in enumerate(SHAPES_OF_T10))
    results = []
    for filling in (None, 7.0, -3e4):
        batch = kernel.pack([query], [keys], [values], page_size=32)
        if filling is not None:
            for cache in (batch.key_cache, batch.value_cache):
                cache[cache.isnan()] = filling
        results.append(kernel.attend(batch, stats=True, page_masses=True))
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.stats, results[0].stats)
        assert torch.equal(result.page_masses, results[0].page_masses)


SHAPES_OF_T10 = ((3, 4, 64), (77, 2, 64), (77, 2, 64))


@any_inputs
@given(data=st.data(), n=st.integers(2, 90), past=st.sampled_from((0, 1, 60)))
def test_t11_chunks_and_single_steps_equal_one_shot(kernel, data, n, past):
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4)) | {0, n})
    q, k, v = (
        normal(count, heads, 64, seed=i) for i, (count, heads) in enumerate(((n, 4), (past + n, 2), (past + n, 2)))
    )
    q, k, v = (x.to(kernel.dtype) for x in (q, k, v))
    whole = kernel.attend(kernel.pack([q], [k], [v]))
    for begin, end in itertools.pairwise(cuts):
        part = kernel.attend(kernel.pack([q[begin:end]], [k[: past + end]], [v[: past + end]]))
        kernel.check_out(part.out.double().numpy(), whole.out[begin:end].double().numpy(), v)
        kernel.check_stats(part.stats.double().numpy(), whole.stats[begin:end].double().numpy())


@pytest.mark.parametrize("copies", [2, 5])
def test_t12_duplicated_keys_share_their_mass(kernel, copies):
    q, k, v = triple(kernel, 3, 60)
    seen = kernel(q, k, v)
    all_twice = kernel(q, k.repeat(copies, 1), v.repeat(copies, 1))
    kernel.check_out(all_twice.out, seen.out, v)
    kernel.check_stats(all_twice.stats[:, ENTROPY] - np.log(copies), seen.stats[:, ENTROPY])
    kernel.check_stats(all_twice.stats[:, LSE] - np.log(copies), seen.stats[:, LSE])
    # Key 7 alone: its mass p becomes r p / (1 + (r - 1) p), in equal parts.
    p = weights(q, k)[:, 7]
    one_hot = torch.zeros(60 + copies - 1, 64)
    one_hot[7, 0] = 1
    for copy in range(1, copies):
        one_hot[59 + copy, copy] = 1
    parts = kernel(q, torch.cat([k, *[k[7:8]] * (copies - 1)]), one_hot).out[:, :copies]
    expected = (p / (1 + (copies - 1) * p))[:, None].repeat(copies, 1)
    kernel.check_out(parts, expected, one_hot)


def test_t13_gaussian_scores_have_entropy_log_n_minus_half(kernel):
    rows, n = kernel.size(64, 16), kernel.size(8192, 1024)
    q, k, v = triple(kernel, rows, n)
    q = kernel.round(q * (8 / q.norm(dim=-1, keepdim=True)))  # so that scores have variance 1 exactly
    assert abs(kernel(q, k, v).stats[:, ENTROPY].mean() - (np.log(n) - 0.5)) < 0.05


@pytest.mark.parametrize("sharpness", [0.0, 0.05, 0.5, 2.0, 30.0])
def test_t14_bounds_and_exact_cases(kernel, sharpness):
    """Renyi's order, the bounds of entropy, and H = h(p_0) + (1 - p_0) H_rest."""
    n = 100
    q, k, v = triple(kernel, 6, n)
    seen, p = kernel(q, k, v, scale=sharpness), weights(q, k, sharpness)
    h, p_max = seen.stats[:, ENTROPY], seen.stats[:, P_MAX]
    assert (h >= -1e-5).all()
    assert (h <= np.log(n) + 1e-5).all()
    collision = -np.log((p**2).sum(-1))
    assert (h >= collision - 1e-4).all()
    assert (collision >= -np.log(p_max) - 1e-4).all()
    first = p[:, 0]
    rest = kernel(q, k[1:], v[1:], scale=sharpness).stats[:, ENTROPY]
    kernel.check_stats(h, entropy(np.stack([first, 1 - first], -1)) + (1 - first) * rest)


def test_t14_one_key_equal_keys_and_two_keys(kernel):
    q = torch.zeros(1, 64)
    q[0, 0] = 1
    one = kernel(q, torch.ones(1, 64), normal(1, 64), scale=1.0).stats[0]
    assert one[ENTROPY] == 0
    assert one[P_MAX] == 1
    for gap in (0.0, 0.5, 3.0, 20.0, 200.0):
        keys = torch.zeros(2, 64)
        keys[1, 0] = gap
        stats = kernel(q, keys, normal(2, 64), scale=1.0).stats[0]
        p = 1 / (1 + np.exp(-gap))
        expected = [gap + np.log1p(np.exp(-gap)), float(entropy(np.array([p, 1 - p]))), p, 1, 1]
        compare(f"gap {gap}", stats, expected, 1e-6 * max(1, gap))


def test_t15_masses_add_up(kernel):
    """Pages sum to one and to the sink's and the recent mass; coarser pages tell heads apart less, never more."""
    q, k, v = triple(kernel, 6, 256)
    seen, p = kernel(kernel.round(3 * q), k, v), weights(kernel.round(3 * q), k)
    compare("pages", seen.masses.sum(-1), np.ones(6), 1e-5)
    compare("sink", seen.stats[:, SINK], p[:, :4].sum(-1), 1e-5)
    compare("recent is the last four pages", seen.stats[:, RECENT], seen.masses[:, -4:].sum(-1), 1e-5)
    coarse = [seen.masses.reshape(6, -1, count).sum(-1) for count in (1, 2, 4, 16)]
    information = [divergence(masses) for masses in coarse]
    assert information == sorted(information, reverse=True)
    assert information[-1] >= -1e-9
    assert information[0] <= np.log(6)
    # log n = KL(mean || uniform) + routing + mean H
    mean = coarse[0].mean(0)
    kl = float((mean * np.log(mean * len(mean))).sum())
    assert abs(np.log(len(mean)) - (kl + information[0] + entropy(coarse[0]).mean())) < 1e-4


def test_t15_equal_heads_agree_and_disjoint_heads_share_nothing(kernel):
    k, v = torch.zeros(128, 64), kernel.round(normal(128, 64))
    for head in range(8):
        k[16 * head : 16 * head + 16, head] = 100
    apart = kernel(torch.eye(64)[:8], k, v, scale=1.0)
    assert abs(divergence(apart.masses) - np.log(8)) < 1e-5
    alike = kernel(torch.eye(64)[:1].repeat(8, 1), k, v, scale=1.0)
    assert abs(divergence(alike.masses)) < 1e-6


def test_t16_linear_attention_is_a_step_of_gradient_descent():
    """Without softmax, in float64: keys x_j, values eta / N (y_j - W0 x_j). No kernel of ours is linear."""
    x, y, q = (normal(50, size, seed=size).double() for size in (8, 3, 8))
    w0, eta = normal(3, 8, seed=9).double(), 0.1
    values = eta / 50 * (y - x @ w0.T)
    attended = q @ w0.T + (q @ x.T) @ values
    w = w0.clone().requires_grad_()
    (0.5 / 50 * ((x @ w.T - y) ** 2).sum()).backward()
    torch.testing.assert_close(attended, q @ (w0 - eta * w.grad).T, rtol=0, atol=1e-12)


def test_t17_the_odd_part_of_small_scores_is_that_step(exact_kernel):
    """[A(eps q) - A(-eps q)] / 2 eps is the mean of v_j (s_j - mean s), with an error that falls as eps squared; with
    data mirrored, (x, y) and (-x, -y), the mean score vanishes and it is the step itself."""
    kernel = exact_kernel
    q, k, v = triple(kernel, 3, 200)

    def odd_part(keys, values, eps):
        plus, minus = (kernel(sign * eps * q, keys, values).out for sign in (1, -1))
        return (plus - minus) / (2 * eps)

    scores = (q.double() @ k.double().T).numpy() / 8
    expected = (scores - scores.mean(-1, keepdims=True)) @ v.double().numpy() / 200
    errors = [np.abs(odd_part(k, v, eps) - expected).max() / np.abs(expected).max() for eps in (1e-1, 1e-2)]
    assert errors[1] < 1e-2
    assert 50 < errors[0] / errors[1] < 200
    step = scores @ v.double().numpy() / 200
    mirrored = odd_part(torch.cat([k, -k]), torch.cat([v, -v]), 1e-2)
    assert np.abs(mirrored - step).max() < 1e-2 * np.abs(step).max()


def test_t18_and_it_is_no_more_than_one_step():
    """One step differs from least squares, and lowers the loss where eta < 2 / the largest eigenvalue."""
    x, y = normal(50, 8).double(), normal(50, 3, seed=1).double()
    curvature = x.T @ x / 50
    eta = 1.9 / torch.linalg.eigvalsh(curvature).max()
    one_step = eta / 50 * y.T @ x
    least_squares = torch.linalg.lstsq(x, y).solution.T

    def loss(w):
        return float(0.5 / 50 * ((x @ w.T - y) ** 2).sum())

    assert (one_step - least_squares).norm() > 0.1 * least_squares.norm()
    assert loss(least_squares) < loss(one_step) < loss(torch.zeros(3, 8, dtype=torch.float64))


@any_inputs
@given(cuts=st.lists(st.integers(0, 200), max_size=5), order=st.sampled_from(("left", "right", "tree")))
def test_t19_any_split_merges(kernel, cuts, order):
    """Parts that know their own normalised results alone, merged by weights W = exp(lse_part - lse) in any order: out,
    lse, H = sum W (H - log W), p_max and masses; empty parts are skipped, not multiplied."""
    q, k, v = triple(kernel, 3, 200)
    whole = kernel(q, k, v)
    edges = [0, *sorted(cuts), 200]
    parts = [kernel(q, k[a:b], v[a:b]) for a, b in itertools.pairwise(edges) if b > a]
    states = [(part.stats[:, LSE], part.out, part.stats[:, ENTROPY], part.stats[:, P_MAX]) for part in parts]

    def merge(a, b):
        lse = np.logaddexp(a[0], b[0])
        w = np.exp(np.stack([a[0], b[0]]) - lse)
        out = (w[:, :, None] * np.stack([a[1], b[1]])).sum(0)
        h = (w * (np.stack([a[2], b[2]]) - np.log(w))).sum(0)
        return lse, out, h, (w * np.stack([a[3], b[3]])).max(0)

    def tree(items):
        half = len(items) // 2
        return items[0] if len(items) == 1 else merge(tree(items[:half]), tree(items[half:]))

    folds = {
        "left": lambda: functools.reduce(merge, states),
        "right": lambda: functools.reduce(lambda a, b: merge(b, a), reversed(states)),
        "tree": lambda: tree(states),
    }
    lse, out, h, p_max = folds[order]()
    kernel.check_out(out, whole.out, v)
    kernel.check_stats(np.stack([lse, h, p_max], -1), whole.stats[:, :SINK])
    # What each part contributes to the output is a share: they sum to one.
    share = np.exp(np.stack([s[0] for s in states]) - lse)[:, :, None] * np.stack([s[1] for s in states])
    compare("contributions", (share * out).sum((0, -1)) / (out**2).sum(-1), np.ones(3), 1e-9)


def test_t20_company_does_not_change_what_is_seen(kernel):
    """Another sequence in the batch leaves outputs and statistics within tolerance; bits are in test_invariance.py, and
    statistics on or off in test_attention.py."""
    shapes = ((2, 4), (90, 2), (90, 2), (3, 4), (200, 2), (200, 2))
    q, k, v, *others = (normal(*shape, 64, seed=i).to(kernel.dtype) for i, shape in enumerate(shapes))
    alone = kernel.attend(kernel.pack([q], [k], [v]))
    others = [
        x.to(kernel.dtype) for x in (9 * normal(3, 4, 64, seed=3), normal(200, 2, 64, seed=4), normal(200, 2, 64))
    ]
    both = kernel.attend(kernel.pack([others[0], q], [others[1], k], [others[2], v]))
    kernel.check_out(both.out[3:].double().numpy(), alone.out.double().numpy(), v)
    kernel.check_stats(both.stats[3:].double().numpy(), alone.stats.double().numpy())


def test_t21_the_temperature_slope_of_entropy_is_minus_varentropy(kernel):
    """The derivative dH / d log beta is -Var(log p), by a central difference."""
    q, k, v = triple(kernel, 4, 300)
    e = 1e-2
    above, below = (kernel(q, k, v, scale=0.125 * (1 + x)).stats[:, ENTROPY] for x in (e, -e))
    log_p = np.log(weights(q, k))
    mean = (np.exp(log_p) * log_p).sum(-1, keepdims=True)
    varentropy = (np.exp(log_p) * (log_p - mean) ** 2).sum(-1)
    compare("slope", (above - below) / (2 * e), -varentropy, 1e-2 * varentropy)
