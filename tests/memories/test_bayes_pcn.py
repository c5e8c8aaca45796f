"""BayesPCN against its equations: gradients, conjugate updates, forgetting, deletion, errors."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtool.errors import (
    AlreadyExistsError,
    CapacityError,
    ConfigError,
    CorruptError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.memories.bayes_pcn import (
    PRESETS,
    BayesPCN,
    BayesPCNSettings,
    Belief,
    Evidence,
    _learned,
    energy,
    names_in,
)

SMALL = BayesPCNSettings(hidden=24, steps=400)
HASTY = replace(SMALL, steps=40)
"""For what does not depend on how good the hidden activities are."""


def patterns(count, numel, seed=0, rms=1.0):
    generator = torch.Generator().manual_seed(seed)
    return rms * torch.randn(count, numel, generator=generator, dtype=torch.float64)


def filled(rows, key_length, constants=SMALL, seed=0):
    memory = BayesPCN(rows.shape[1], key_length, constants, seed=seed)
    for number, row in enumerate(rows):
        memory.write(f"p{number}", row)
    return memory


def learned_belief(hidden_units, layers, count, seed):
    """A belief after `count` patterns with random hidden activities."""
    generator = torch.Generator().manual_seed(seed)
    belief = Belief.prior(BayesPCNSettings(hidden=hidden_units, layers=layers))
    codes = torch.randn(count, layers - 1, hidden_units, generator=generator, dtype=torch.float64)
    for code in codes:
        belief = _learned(belief, code, 0.1)
    return belief, codes


def plain_energy(hidden, observed, weights, belief, sigma, entries):
    """The energy written out, R_0 as a matrix, for autograd: the slow obvious twin."""
    total = torch.zeros(hidden.shape[1], dtype=torch.float64)
    below = observed
    for layer in range(hidden.shape[0]):
        z = torch.nn.functional.gelu(hidden[layer])
        mean = weights if layer == 0 else belief.means[layer - 1]
        count = entries if layer == 0 else hidden.shape[2]
        for row in range(hidden.shape[1]):
            v = sigma**2 + z[row] @ belief.covariance[layer] @ z[row]
            e = below[row] - z[row] @ mean
            total[row] = total[row] + count / 2 * torch.log(v) + (e @ e) / (2 * v)
        below = hidden[layer]
    above = hidden[-1] - belief.top
    return total + above.square().sum(1) / (2 * (sigma**2 + belief.top_variance))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    layers=st.integers(2, 4),
    count=st.integers(0, 5),
    joint=st.booleans(),
)
def test_energy_and_gradient_agree_with_autograd(seed, layers, count, joint):
    h, numel, key = 7, 40, 15
    belief, _ = learned_belief(h, layers, count, seed)
    stored, queries = patterns(count, numel, seed), patterns(3, key, seed + 1)
    weights = belief.mixture @ stored[:, :key]
    entries = numel if joint else key
    evidence = Evidence(
        square=queries.square().sum(1),
        pull=(queries @ stored[:, :key].T) @ belief.mixture.T,
        gram=belief.mixture @ (stored[:, :key] @ stored[:, :key].T) @ belief.mixture.T,
        entries=entries,
    )
    hidden = patterns(layers - 1, 3 * h, seed + 2).reshape(layers - 1, 3, h).requires_grad_()
    slow = plain_energy(hidden, queries, weights, belief, 0.1, entries)
    (expected,) = torch.autograd.grad(slow.sum(), hidden)
    found, gradient = energy(hidden.detach(), evidence, belief, 0.1)
    assert torch.allclose(found, slow.detach(), rtol=1e-10, atol=1e-10)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-10 * expected.abs().max())


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1)])
def test_rank_one_writes_equal_batch_ridge_regression_in_any_order(order):
    h, sigma = 9, 0.1
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(5, 3, h, generator=generator, dtype=torch.float64)
    belief = Belief.prior(BayesPCNSettings(hidden=h))
    for place in order:
        belief = _learned(belief, codes[place], sigma)
    rows = patterns(5, 30)[list(order)]
    z = torch.nn.functional.gelu(codes[list(order)])
    targets = [rows, codes[list(order), 0], codes[list(order), 1]]
    for layer in range(3):
        precision = torch.eye(h, dtype=torch.float64) + z[:, layer].T @ z[:, layer] / sigma**2
        mean = torch.linalg.solve(precision, z[:, layer].T @ targets[layer] / sigma**2)
        found = belief.mixture @ rows if layer == 0 else belief.means[layer - 1]
        assert torch.allclose(found, mean, atol=1e-9)
        assert torch.allclose(belief.covariance[layer], torch.linalg.inv(precision), atol=1e-9)


def test_inner_products_are_kept_exactly_as_recomputed():
    rows = patterns(6, 500)
    memory = filled(rows, 50, HASTY)
    memory.delete("p2")
    left = rows[[0, 1, 3, 4, 5]]
    assert torch.allclose(memory._whole, left @ left.T, rtol=1e-12, atol=1e-9)
    assert torch.allclose(memory._keys, left[:, :50] @ left[:, :50].T, rtol=1e-12, atol=1e-9)


def test_stored_patterns_come_back_and_unknown_keys_are_new():
    rows = patterns(6, 4000, rms=0.02)
    memory = filled(rows, 400)
    recalled = memory.recall(memory.key_of(rows))
    error = (recalled.patterns - rows).norm(dim=1) / rows.norm(dim=1)
    assert float(error.max()) < 5e-4
    assert recalled.nearest.tolist() == list(range(6))
    assert torch.allclose(recalled.coefficients, torch.eye(6, dtype=torch.float64), atol=5e-3)
    assert float(recalled.novelty.max()) < 1e-4
    unknown = memory.recall(patterns(3, 400, seed=9))
    assert float(unknown.novelty.min()) > 0.9
    assert float(unknown.energy.min()) > float(recalled.energy.max())


def test_the_scale_of_patterns_does_not_matter_when_scaled():
    rows = (
        patterns(5, 1000) * torch.tensor([1e-3, 0.02, 1.0, 30.0, 5.0], dtype=torch.float64)[:, None]
    )
    memory = filled(rows, 100)
    recalled = memory.recall(memory.key_of(rows)).patterns
    assert float(((recalled - rows).norm(dim=1) / rows.norm(dim=1)).max()) < 2e-3
    # A key of another scale recalls the pattern in that scale.
    twice = memory.recall(2 * memory.key_of(rows)).patterns
    assert torch.allclose(twice, 2 * recalled, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rms", [0.05, 0.2])
def test_without_scaling_the_error_follows_the_floor(rms):
    """About (numel / key) (σ / rms)², from the pull of the prior on the code."""
    rows, key = patterns(6, 3000, rms=rms), 300
    joint = replace(SMALL, scaled=False, logdet="joint")
    memory = filled(rows, key, joint)
    recalled = memory.recall(memory.key_of(rows)).patterns
    error = float(((recalled - rows).norm(dim=1) / rows.norm(dim=1)).mean())
    floor = (3000 / key) * (SMALL.sigma / rms) ** 2
    assert 0.3 * floor < error < 3 * floor


def test_a_recall_does_not_depend_on_the_other_keys():
    rows = patterns(6, 600)
    memory = filled(rows, 60, HASTY)
    together = memory.recall(memory.key_of(rows))
    alone = memory.recall(memory.key_of(rows[4:5]))
    assert torch.allclose(together.patterns[4:5], alone.patterns, atol=1e-9)
    assert torch.allclose(together.energy[4:5], alone.energy, rtol=1e-9)


def test_forget_one_leaves_the_prior_and_forget_zero_changes_nothing():
    rows = patterns(4, 200)
    memory = filled(rows, 20)
    before = memory.belief
    memory.forget(0.0)
    assert memory.belief is before
    memory.forget(1.0)
    prior = Belief.prior(SMALL)
    assert torch.equal(memory.belief.covariance, prior.covariance)
    assert not memory.belief.means.any()
    assert memory.belief.mixture.shape == (24, 0)
    assert not memory.belief.top.any()
    assert memory.belief.top_variance == 1.0
    # It is empty: what was in it can be written again.
    assert memory.names == ()
    memory.write("p0", rows[0])
    found = memory.recall(memory.key_of(rows[:1])).patterns
    assert float((found - rows[:1]).norm() / rows[0].norm()) < 1e-3


def test_forgetting_by_halves_moves_toward_the_prior():
    memory = filled(patterns(4, 200), 20, HASTY)
    size = float(memory.belief.mixture.norm())
    memory.forget(0.75)
    assert float(memory.belief.mixture.norm()) == pytest.approx(size / 2)
    with pytest.raises(ConfigError, match="before forget"):
        memory.delete("p0")
    with pytest.raises(ConfigError):
        memory.forget(1.5)


def test_forgetting_fades_every_layer_by_the_same_law():
    memory, share = filled(patterns(3, 60), 20, HASTY), 0.3
    before, prior = memory.belief, Belief.prior(SMALL)
    memory.forget(share)
    after, keep = memory.belief, (1 - share) ** 0.5
    for name in ("means", "mixture", "top"):  # means: those of the prior are zero
        torch.testing.assert_close(getattr(after, name), keep * getattr(before, name))
    expected = (1 - share) * before.covariance + share * prior.covariance
    torch.testing.assert_close(after.covariance, expected)
    assert after.top_variance == pytest.approx(
        (1 - share) * before.top_variance + share * prior.top_variance
    )
    # Twice is once with what is left of what is left, in the top layer as in the others.
    memory.forget(share)
    twice, memory.belief = memory.belief, before
    memory.forget(1 - (1 - share) ** 2)
    for name in ("covariance", "means", "mixture", "top"):
        torch.testing.assert_close(getattr(twice, name), getattr(memory.belief, name))
    assert twice.top_variance == pytest.approx(memory.belief.top_variance)


def test_a_top_layer_that_faded_learns_anew():
    """A top belief that keeps its certainty holds new codes where the forgotten ones lay."""
    rows = patterns(4, 60)
    memory = filled(rows[:3], 20)
    certain = memory.belief.top_variance
    memory.forget(0.9)
    faded = memory.belief
    assert faded.top_variance > 0.9 > 100 * certain
    memory.write("new", rows[3])
    code = memory._codes[-1][-1]
    gain = faded.top_variance / (faded.top_variance + SMALL.sigma**2)
    torch.testing.assert_close(memory.belief.top, faded.top + gain * (code - faded.top))
    memory.delete("new")  # what was written after a forget still has an inverse
    torch.testing.assert_close(memory.belief.top, faded.top, atol=1e-8, rtol=0)
    assert memory.belief.top_variance == pytest.approx(faded.top_variance)


def test_write_then_delete_is_the_prior():
    memory = filled(patterns(1, 200), 20)
    memory.delete("p0")
    prior = Belief.prior(SMALL)
    assert torch.allclose(memory.belief.covariance, prior.covariance, atol=1e-8)
    assert torch.allclose(memory.belief.means, prior.means, atol=1e-8)
    assert memory.belief.mixture.shape == (24, 0)
    assert float(memory.belief.top.abs().max()) < 1e-8
    assert memory.belief.top_variance == pytest.approx(1.0)
    assert len(memory) == 0


def test_delete_takes_one_out_and_leaves_the_others():
    rows = patterns(5, 800)
    memory = filled(rows, 80)
    without = BayesPCN.from_bytes(memory.to_bytes(), rows, "here")
    without.delete("p1")
    assert without.names == ("p0", "p2", "p3", "p4")
    known = without.recall(without.key_of(rows[[0, 2, 3, 4]]))
    expected = rows[[0, 2, 3, 4]]
    assert float(((known.patterns - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 2e-3
    assert float(without.recall(without.key_of(rows[1:2])).novelty) > 0.8
    assert float(memory.recall(memory.key_of(rows[1:2])).novelty) < 0.01
    with pytest.raises(NotFoundError):
        without.delete("p1")


def test_a_memory_from_its_bytes_goes_on_exactly():
    rows = patterns(5, 300)
    memory = filled(rows[:4], 30, HASTY)
    data = memory.to_bytes()
    assert names_in(data, "here") == ("p0", "p1", "p2", "p3")
    again = BayesPCN.from_bytes(data, rows[:4], "here")
    for one in (memory, again):
        one.write("more", rows[4])
    assert again.to_bytes() == memory.to_bytes()
    keys = memory.key_of(rows)
    assert torch.equal(again.recall(keys).patterns, memory.recall(keys).patterns)


def test_bytes_of_something_else_and_other_patterns_are_told():
    memory = filled(patterns(2, 100), 10)
    with pytest.raises(CorruptError, match="blob 'x'"):
        BayesPCN.from_bytes(b"not this", patterns(2, 100), "blob 'x'")
    with pytest.raises(CorruptError):
        names_in(b"12345678{}", "blob 'x'")
    with pytest.raises(MismatchError):
        BayesPCN.from_bytes(memory.to_bytes(), patterns(3, 100), "here")


def test_searching_for_the_free_entries_finds_the_profiled_answer():
    rows = patterns(3, 120)
    memory = filled(rows, 60)
    profiled = memory.recall(memory.key_of(rows))
    memory.settings = replace(SMALL, profiled=False, steps=2000)
    searched = memory.recall(memory.key_of(rows))
    assert torch.allclose(searched.patterns, profiled.patterns, atol=0.02)


def test_a_full_memory_says_so_and_a_crowded_one_warns():
    tight = BayesPCNSettings(hidden=5, steps=5)
    rows = patterns(6, 50)
    memory = BayesPCN(50, 10, tight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(4):
            memory.write(str(number), rows[number])
    with pytest.warns(UserWarning, match="hidden width 5"):
        memory.write("4", rows[4])
    with pytest.raises(CapacityError, match="hidden width 5 is full: it holds 5"):
        memory.write("5", rows[5])
    assert len(memory) == 5


def test_keys_that_cannot_work_are_refused_by_name():
    rows = patterns(3, 100)
    memory = filled(rows[:2], 10)
    twin = rows[2].clone()
    twin[:10] = rows[1][:10]
    with pytest.raises(AlreadyExistsError, match="'p1' and 'twin'"):
        memory.write("twin", twin)
    with pytest.raises(AlreadyExistsError):
        memory.write("p1", rows[2])
    with pytest.raises(DataError, match="constant"):
        memory.write("flat", torch.cat([torch.full((10,), 0.5), rows[2][10:]]))
    with pytest.raises(DataError, match="not finite"):
        memory.write("nan", torch.cat([rows[2][:50], torch.full((50,), math.nan)]))
    with pytest.raises(MismatchError):
        memory.write("short", rows[2][:99])
    with pytest.raises(MismatchError):
        memory.recall(rows[:, :11])
    with pytest.raises(DataError):
        memory.recall(torch.full((1, 10), math.nan))
    with pytest.raises(NotFoundError):
        BayesPCN(100, 10, SMALL).recall(rows[:, :10])
    assert len(memory) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": 0},
        {"layers": 1},
        {"steps": 0},
        {"sigma": 0.0},
        {"step_size": -1.0},
        {"logdet": "x"},
    ],
)
def test_constants_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        BayesPCNSettings(**wrong)
    with pytest.raises(ConfigError):
        BayesPCN(100, 100, SMALL)


def test_the_published_preset_is_joint_unscaled_and_searches():
    published = PRESETS["published"]
    assert (published.logdet, published.scaled, published.profiled) == ("joint", False, False)
    assert not published.decay
    assert PRESETS["default"] == BayesPCNSettings()
