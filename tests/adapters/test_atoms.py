"""The gate of MoRAM against a loop over tokens and atoms in float64, and its laws."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.adapters import atoms as atoms_file
from memtool.adapters.atoms import (
    AtomBank,
    AtomGate,
    BlockAtoms,
    ModuleAtoms,
    activations,
    add_atoms,
)
from memtool.adapters.layout import Site
from memtool.adapters.mixing import Mixture
from memtool.errors import ConfigError, MismatchError

MODULE = "blocks.0.attn.qkv"
SOFT = AtomGate(topk=3, temperature=0.5, threshold=0.1)


@dataclass
class Case:
    """A module with a bank for each of its sites, an input and a frozen output."""

    sites: tuple[Site, ...]
    banks: list[AtomBank]
    x: Tensor
    y: Tensor

    def atoms(self) -> ModuleAtoms:
        return ModuleAtoms(self.sites, tuple(self.banks))

    def leaves(self) -> list[Tensor]:
        return [
            self.x,
            self.y,
            *(bank.keys for bank in self.banks),
            *(bank.values for bank in self.banks),
        ]


def make(
    counts: tuple[int, ...] = (6,),
    *,
    fresh: int = 2,
    rank: int = 2,
    width: int = 5,
    rows: int = 4,
    batch: int = 2,
    tokens: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    learns: bool = True,
) -> Case:
    """Banks of `counts` atoms at slices of one module, `rank` for each task."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # One row of the module before the first slice, and one behind the last, belong to no site.
    total = rows * len(counts) + 2
    sites = tuple(
        Site(0, MODULE, name, width, rows, 1 + rows * place, total)
        for place, name in zip(range(len(counts)), "qkv", strict=False)
    )
    banks = [
        AtomBank(
            randn(count, width).requires_grad_(learns),
            randn(count, rows).requires_grad_(learns),
            torch.rand(count, generator=generator) + 0.5,
            torch.arange(count) // rank,
            min(fresh, count),
        )
        for count in counts
    ]
    return Case(
        sites,
        banks,
        randn(batch, tokens, width).requires_grad_(learns),
        randn(batch, tokens, total).requires_grad_(learns),
    )


def oracle_weights(x: Tensor, bank: AtomBank, gate: AtomGate, training: bool) -> list[Tensor]:
    """Weight and gated response of every atom for one token x (d,), one atom at a time."""
    count = len(bank)
    z = [bank.keys[i] @ x for i in range(count)]
    owner = bank.owner.tolist()

    def norm_of(i: int, kept: set[int] | None) -> Tensor:
        members = [j for j in range(count) if gate.score_norm == "bank" or owner[j] == owner[i]]
        total = sum(
            (z[j] if kept is None or j in kept else z[j].detach()) ** 2 for j in members
        ) + torch.zeros((), dtype=x.dtype)
        return total.sqrt().clamp_min(1e-12)

    scores = [z[i] / norm_of(i, None) for i in range(count)]
    order = sorted(range(count), key=lambda i: -scores[i].item())
    kept = order[: min(gate.topk, count)]
    if gate.selected_only:
        scores = [z[i] / norm_of(i, set(kept)) for i in range(count)]
    exps = {i: ((scores[i] - scores[kept[0]].detach()) / gate.temperature).exp() for i in kept}
    whole = sum(exps.values())
    least = gate.threshold
    if gate.scaled_threshold and gate.score_norm == "bank":
        least /= math.sqrt(len(set(owner)))
    weights = [torch.zeros((), dtype=x.dtype) for _ in range(count)]
    for i in kept:
        if training or scores[i].item() >= least:
            weights[i] = exps[i] / whole
    return [torch.stack(weights), torch.stack([w * v for w, v in zip(weights, z, strict=True)])]


def gap_after(x: Tensor, bank: AtomBank, gate: AtomGate) -> float:
    """The least distance of the last kept score from the first not kept, and of any from δ."""
    with torch.no_grad():
        z = x @ bank.keys.t()
        same = bank.owner.unsqueeze(0) == bank.owner.unsqueeze(1)
        if gate.score_norm == "bank":
            same = torch.ones_like(same)
        scores = (z / (z.square() @ same.to(z.dtype)).sqrt()).sort(-1, descending=True).values
        gaps = [(scores - gate.threshold).abs().min().item()] if len(bank) else [1.0]
        if len(bank) > gate.topk:
            between = scores[..., gate.topk - 1] - scores[..., gate.topk]
            gaps.append(between.min().item())
    return min(gaps)


def oracle(case: Case, gate: AtomGate, training: bool) -> Tensor:
    """The definition, one sample, token and atom at a time; differentiable."""
    samples = []
    for sample in range(len(case.x)):
        tokens = []
        for token in range(case.x.shape[1]):
            row = case.y[sample, token]
            for site, bank in zip(case.sites, case.banks, strict=True):
                if not len(bank):
                    continue
                first = len(bank) - bank.fresh
                own = AtomBank(  # only the fresh atoms have gradients
                    torch.cat((bank.keys[:first].detach(), bank.keys[first:])),
                    torch.cat((bank.values[:first].detach(), bank.values[first:])),
                    bank.scaling,
                    bank.owner,
                )
                _, gated = oracle_weights(case.x[sample, token], own, gate, training)
                for i in range(len(own)):
                    part = gated[i] * own.scaling[i].to(row.dtype) * own.values[i]
                    before = site.first_row
                    after = site.module_rows - before - site.out_features
                    row = row + F.pad(part, (before, after))
            tokens.append(row)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


def check(case: Case, gate: AtomGate, training: bool) -> None:
    """Forward with and without gradients, and all gradients, against the oracle."""
    expected = oracle(case, gate, training)
    with torch.no_grad():
        into = case.y.detach().clone()
        quiet = add_atoms(into, case.x, case.atoms(), gate, training=training)
    torch.testing.assert_close(quiet, expected, rtol=1e-10, atol=1e-10)
    found = add_atoms(case.y, case.x, case.atoms(), gate, training=training)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pull = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype
    )
    leaves = case.leaves()
    wanted = torch.autograd.grad((expected * pull).sum(), leaves, allow_unused=True)
    got = torch.autograd.grad((found * pull).sum(), leaves, allow_unused=True)
    for leaf, one, other in zip(leaves, wanted, got, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if other is None else other, zero if one is None else one, rtol=1e-8, atol=1e-8
        )


@settings(max_examples=80)
@given(
    counts=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    fresh=st.integers(0, 5),
    rank=st.integers(1, 4),
    width=st.integers(1, 6),
    rows=st.integers(1, 5),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 3),
    topk=st.integers(2, 6),
    temperature=st.sampled_from([0.2, 0.5, 2.0]),
    score_norm=st.sampled_from(["bank", "task"]),
    selected_only=st.booleans(),
    scaled_threshold=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_gate_is_the_loop(
    counts,
    fresh,
    rank,
    width,
    rows,
    batch,
    tokens,
    topk,
    temperature,
    score_norm,
    selected_only,
    scaled_threshold,
    training,
    seed,
):
    case = make(
        tuple(counts),
        fresh=fresh,
        rank=rank,
        width=width,
        rows=rows,
        batch=batch,
        tokens=tokens,
        seed=seed,
    )
    gate = AtomGate(topk, temperature, 0.25, score_norm, scaled_threshold, selected_only)
    # Where the last kept score equals the next, as it may for one atom a task, both are right.
    assume(all(gap_after(case.x, bank, gate) > 1e-6 for bank in case.banks))
    check(case, gate, training)


@pytest.mark.parametrize("score_norm", ["bank", "task"])
@pytest.mark.parametrize("selected_only", [False, True])
@pytest.mark.parametrize(
    ("counts", "width"),
    [((40,), 3), ((40, 24, 33), 3), ((9,), 30), ((4, 40), 12)],
    ids=["gram, gathered", "gram, three sites", "computed again", "both"],
)
def test_every_way_of_computing_is_the_loop(counts, width, score_norm, selected_only):
    case = make(counts, width=width, tokens=7, rank=8, fresh=8)
    gate = AtomGate(4, 0.4, 0.2, score_norm, selected_only=selected_only)
    check(case, gate, training=True)
    check(case, gate, training=False)


@pytest.mark.parametrize("score_norm", ["bank", "task"])
def test_tokens_in_parts_are_the_loop(monkeypatch, score_norm):
    monkeypatch.setattr(atoms_file, "RESPONSES", 3 * (40 + 24))
    case = make((40, 24), width=3, tokens=7, rank=8, fresh=8)
    gate = AtomGate(4, 0.4, 0.2, score_norm)
    check(case, gate, training=True)
    check(case, gate, training=False)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("score_norm", ["bank", "task"])
def test_gradcheck(rank, score_norm):
    case = make((7, 5), fresh=4, rank=rank, tokens=2)
    gate = AtomGate(3, 0.5, 0.1, score_norm)

    def function(*leaves: Tensor) -> Tensor:
        x, y, *rest = leaves
        banks = tuple(
            AtomBank(
                torch.cat((bank.keys[: -bank.fresh].detach(), rest[2 * place])),
                torch.cat((bank.values[: -bank.fresh].detach(), rest[2 * place + 1])),
                bank.scaling,
                bank.owner,
                bank.fresh,
            )
            for place, bank in enumerate(case.banks)
        )
        return add_atoms(y, x, ModuleAtoms(case.sites, banks), gate, training=True)

    tails = [
        tensor[-bank.fresh :].detach().requires_grad_()
        for bank in case.banks
        for tensor in (bank.keys, bank.values)
    ]
    assert torch.autograd.gradcheck(function, (case.x, case.y, *tails))


def test_an_input_without_gradients_still_teaches_the_atoms():
    case = make((8,), fresh=3)
    x = case.x.detach()
    out = add_atoms(case.y, x, case.atoms(), SOFT, training=True)
    got = torch.autograd.grad(out.square().sum(), (case.banks[0].keys, case.banks[0].values))
    case.x = x
    expected = oracle(case, SOFT, True)
    wanted = torch.autograd.grad(
        expected.square().sum(), (case.banks[0].keys, case.banks[0].values)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score_norm", ["bank", "task"])
@pytest.mark.parametrize("counts", [(0,), (0, 0, 0), (1,), (1, 0, 6)])
def test_empty_banks_and_banks_of_one_atom(counts, score_norm):
    case = make(counts, fresh=1)
    gate = AtomGate(4, 0.5, 0.1, score_norm)
    check(case, gate, training=True)
    check(case, gate, training=False)
    if not any(counts):
        assert torch.equal(add_atoms(case.y, case.x, case.atoms(), gate), case.y)


def test_tokens_without_any_response_stay_as_they_are_and_have_gradients():
    case = make((6,), learns=True)
    case.x = torch.zeros_like(case.x).requires_grad_()
    for gate in (SOFT, replace(SOFT, score_norm="task")):
        out = add_atoms(case.y, case.x, case.atoms(), gate, training=True)
        assert torch.equal(out, case.y)
        for gradient in torch.autograd.grad(out.sum(), case.leaves()):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [0, 2])
def test_an_empty_batch_stays_empty(tokens):
    case = make((6,), batch=0 if tokens else 2, tokens=tokens)
    out = add_atoms(case.y, case.x, case.atoms(), SOFT)
    assert out.shape == case.y.shape


@settings(max_examples=30)
@given(
    factor=st.floats(0.01, 100),
    score_norm=st.sampled_from(["bank", "task"]),
    count=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_a_scaled_token_gets_the_scaled_contribution(factor, score_norm, count, seed):
    case = make((count,), seed=seed, learns=False)
    gate = AtomGate(3, 0.05, -1.0, score_norm)
    zero = torch.zeros_like(case.y)
    one = add_atoms(zero.clone(), case.x, case.atoms(), gate)
    scaled = add_atoms(zero.clone(), factor * case.x, case.atoms(), gate)
    torch.testing.assert_close(scaled, factor * one.detach(), rtol=1e-9, atol=1e-9)


def test_the_threshold_counts_in_evaluation_only_and_weights_are_not_normalised_again():
    case = make((12,), learns=False)
    gate = AtomGate(6, 0.5, 0.35)
    kept = activations(case.x, case.banks[0], gate, training=True)
    passed = activations(case.x, case.banks[0], gate)
    torch.testing.assert_close(kept.sum(-1), torch.ones_like(kept[..., 0]))
    z = case.x @ case.banks[0].keys.t()
    scores = z / z.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(passed, kept * (scores >= 0.35))
    assert (passed.sum(-1) < 0.999).any()
    everything = activations(case.x, case.banks[0], replace(gate, threshold=-1.0))
    assert torch.equal(everything, kept)


def test_activations_are_the_weights_of_the_loop():
    for score_norm in ("bank", "task"):
        gate = AtomGate(4, 0.3, 0.2, score_norm)
        case = make((11,), learns=False)
        found = activations(case.x, case.banks[0], gate)
        assert found.shape == (2, 3, 11)
        for sample in range(2):
            for token in range(3):
                weights, _ = oracle_weights(case.x[sample, token], case.banks[0], gate, False)
                torch.testing.assert_close(found[sample, token], weights)
    empty = make((0,), learns=False)
    assert activations(empty.x, empty.banks[0], SOFT).shape == (2, 3, 0)


def test_weights_too_small_for_a_normal_float_are_zero():
    case = make((20,), dtype=torch.float32, learns=False, rank=20)
    weights = activations(case.x, case.banks[0], AtomGate(20, 0.004, -1.0))
    some = weights[weights > 0]
    assert float(some.min()) > 1e-30
    assert len(some) < weights.numel()


@pytest.mark.parametrize("count", [2, 16, 17, 33, 160, 801, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_are_the_largest(count, dtype):
    scores = torch.randn(50, count, generator=torch.Generator().manual_seed(count)).to(dtype)
    scores[0] = 0.0
    scores[1, 1:] = 0.25  # ties
    scores[2] *= 1e-38  # some are denormal
    for k in (2, min(16, count)):
        found = atoms_file._largest(scores, k)
        assert all(len(set(row)) == k for row in found.tolist())
        assert int(found.min()) >= 0
        assert int(found.max()) < count
        expected = scores.topk(k, dim=1).values
        assert torch.equal(scores.gather(1, found).sort(1, descending=True).values, expected)


def test_numpy_and_torch_choose_the_same(monkeypatch):
    scores = torch.randn(40, 100, generator=torch.Generator().manual_seed(3))
    one = atoms_file._largest(scores, 8).sort(1).values
    monkeypatch.setattr(atoms_file, "FEW_THREADS", 0)
    assert torch.equal(one, atoms_file._largest(scores, 8).sort(1).values)


def run_as(case: Case, dtype: torch.dtype, gate: AtomGate) -> list[Tensor]:
    """Output and gradients with everything in `dtype`."""
    banks = [
        AtomBank(
            bank.keys.detach().to(dtype).requires_grad_(),
            bank.values.detach().to(dtype).requires_grad_(),
            bank.scaling,
            bank.owner,
            bank.fresh,
        )
        for bank in case.banks
    ]
    other = Case(
        case.sites,
        banks,
        case.x.detach().to(dtype).requires_grad_(),
        case.y.detach().to(dtype).requires_grad_(),
    )
    out = add_atoms(other.y, other.x, other.atoms(), gate, training=True)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().square().sum(), other.leaves())
    return [out, *gradients]


@pytest.mark.parametrize("score_norm", ["bank", "task"])
@pytest.mark.parametrize("count", [4, 12, 48])
def test_bfloat16_stays_close_to_float32(count, score_norm):
    case = make((count, count), width=32, rows=24, tokens=20, rank=4, fresh=4, dtype=torch.float32)
    gate = AtomGate(count, 0.5, 0.1, score_norm)  # all are kept: nothing changes places
    for half, full in zip(
        run_as(case, torch.bfloat16, gate), run_as(case, torch.float32, gate), strict=True
    ):
        assert float((half.float() - full).detach().norm() / full.detach().norm()) < 0.02
    # With few kept, atoms of nearly equal score change places; at a low temperature these are
    # light, but where the first two are near a rounded score counts much.
    sparse = replace(gate, topk=min(4, count), temperature=0.05)
    half, full = (
        run_as(case, dtype, sparse)[0].detach().float() for dtype in (torch.bfloat16, torch.float32)
    )
    assert float((half - full).norm() / full.norm()) < 0.05


def test_scores_are_float32_under_bfloat16():
    case = make((12,), dtype=torch.bfloat16, learns=False)
    weights = activations(case.x, case.banks[0], SOFT)
    assert weights.dtype == torch.float32
    sums = activations(case.x, case.banks[0], SOFT, training=True).sum(-1)
    assert float((sums - 1).abs().max()) < 1e-6


def test_autocast_trains_float32_atoms_in_bfloat16():
    case = make((8,), width=16, rows=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixture = Mixture.atoms({MODULE: case.atoms()}, SOFT, training=True)
        out = mixture.add_to(case.y.bfloat16(), case.x.bfloat16(), MODULE)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert case.banks[0].keys.grad is not None
    assert case.banks[0].keys.grad.dtype == torch.float32
    assert not case.banks[0].keys.grad[:-2].any()


def saved_bytes(call, tokens: int) -> int:
    """Bytes of different memory with a row for every token that a call keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tokens in tensor.shape:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


def n_wide(x: Tensor, y: Tensor, bank: AtomBank, gate: AtomGate) -> Tensor:
    """The same with plain tensor operations on all n atoms."""
    z = F.linear(x, bank.keys)
    scores = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    best, places = scores.topk(gate.topk, dim=-1)
    weights = torch.zeros_like(z).scatter(-1, places, (best / gate.temperature).softmax(-1))
    return y + (weights * z) @ (bank.values * bank.scaling.unsqueeze(1))


def test_saved_activations_are_k_wide():
    case = make((800,), width=768, rows=768, tokens=394, batch=1, rank=16, fresh=16)
    bank = AtomBank(
        *(t.detach().float().requires_grad_() for t in (case.banks[0].keys, case.banks[0].values)),
        case.banks[0].scaling,
        case.banks[0].owner,
        16,
    )
    site = Site(0, MODULE, "", 768, 768, 0, 768)
    x, y = torch.randn(1, 394, 768, requires_grad=True), torch.zeros(1, 394, 768)
    gate = AtomGate(16, 0.05, 0.2)
    atoms = ModuleAtoms((site,), (bank,))
    ours = saved_bytes(lambda: add_atoms(y, x, atoms, gate, training=True), 394)
    wide = saved_bytes(lambda: n_wide(x, y, bank, gate), 394)
    assert ours <= wide / 4
    assert ours - x.untyped_storage().nbytes() <= 394 * (16 * (2 + 4) + 4)
    torch.testing.assert_close(
        add_atoms(y, x, atoms, gate, training=True), n_wide(x, y, bank, gate), rtol=1e-3, atol=1e-4
    )


def drift(score_norm: str, tasks: int, **more) -> float:
    """Length of the first task's contribution with `tasks` in the bank, over that with one."""
    generator = torch.Generator().manual_seed(4)
    rank, width = 16, 192
    keys = torch.randn(tasks * rank, width, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 300, width, generator=generator, dtype=torch.float64)
    # Only the first task's values differ from zero, so what is added is its contribution. A high
    # temperature makes the kept weights alike: what is left is which atoms pass.
    values = torch.zeros(tasks * rank, width, dtype=torch.float64)
    values[:rank] = torch.randn(rank, width, generator=generator, dtype=torch.float64)

    def length(count: int) -> float:
        n = count * rank
        owner = torch.arange(n) // rank
        bank = AtomBank(keys[:n], values[:n], torch.ones(n), owner)
        site = Site(0, MODULE, "", width, width, 0, width)
        gate = AtomGate(tasks * rank, 100.0, score_norm=score_norm, **more)
        zero = torch.zeros(1, 300, width, dtype=torch.float64)
        # The uniform weight 1 / n would be a drift of its own: take it out.
        return n * float(add_atoms(zero, x, ModuleAtoms((site,), (bank,)), gate).norm())

    return length(tasks) / length(1)


def test_drift_of_frozen_atoms():
    """methods.md: under "bank" old atoms fall below the threshold, under "task" none does."""
    ten, fifty = drift("bank", 10), drift("bank", 50)
    assert ten < 0.5
    assert fifty < 0.02
    assert drift("task", 10) == pytest.approx(1.0, abs=1e-3)
    assert drift("task", 50) == pytest.approx(1.0, abs=1e-3)
    assert drift("bank", 10, scaled_threshold=True) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("tasks", [4, 16, 64])
def test_scores_shrink_like_one_over_the_root_of_the_bank(tasks):
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(tasks * 8, 128, generator=generator)
    x = torch.randn(400, 128, generator=generator)

    def mean_score(n: int, score_norm: str) -> float:
        bank = AtomBank(keys[:n], keys[:n], torch.ones(n), torch.arange(n) // 8)
        # With all atoms kept, log-weights differ as scores do.
        gate = AtomGate(n, 1.0, -1.0, score_norm)
        logs = activations(x, bank, gate).log()[:, :8]
        return float((logs - logs.mean(1, keepdim=True)).norm())

    shrunk = mean_score(tasks * 8, "bank") / mean_score(8, "bank")
    assert shrunk == pytest.approx(1 / math.sqrt(tasks), rel=0.1)
    assert mean_score(tasks * 8, "task") == pytest.approx(mean_score(8, "task"), rel=1e-4)


def test_a_mixture_of_atoms_adapts_any_number_of_token_dimensions():
    case = make((6, 9), learns=False)
    expected = oracle(case, SOFT, False)
    mixture = Mixture.atoms({MODULE: case.atoms()}, SOFT)
    for shape in ((6,), (2, 3), (1, 2, 3)):
        x = case.x.reshape(*shape, -1)
        y = case.y.clone().reshape(*shape, -1)
        torch.testing.assert_close(mixture.add_to(y, x, MODULE), expected.reshape(y.shape))
    assert mixture.add_to(case.y, case.x, "another") is case.y
    strided = case.y.clone().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(mixture.add_to(strided, case.x, MODULE), expected)
    with pytest.raises(MismatchError, match="input"):
        mixture.add_to(case.y, case.x[..., :-1], MODULE)


def test_the_frozen_output_stays_when_gradients_are_on():
    case = make((6,))
    before = case.y.detach().clone()
    add_atoms(case.y, case.x, case.atoms(), SOFT, training=True).sum().backward()
    assert torch.equal(case.y, before)


def test_gradient_checkpointing_gives_the_same_gradients():
    case = make((20,), fresh=4)
    atoms = case.atoms()

    def function(x: Tensor, y: Tensor) -> Tensor:
        return add_atoms(y, x, atoms, SOFT, training=True).square().sum()

    plain = torch.autograd.grad(function(case.x, case.y), case.leaves())
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(function, case.x, case.y, use_reentrant=False),
        case.leaves(),
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_threads_do_not_disturb_each_other():
    cases = [make((20 + i,), fresh=4, seed=i) for i in range(4)]

    def gradients(case: Case) -> list[Tensor]:
        out = add_atoms(case.y, case.x, case.atoms(), SOFT, training=True)
        return list(torch.autograd.grad(out.square().sum(), case.leaves()))

    alone = [gradients(case) for case in cases]
    together: dict[int, list[Tensor]] = {}

    def work(place: int) -> None:
        for _ in range(10):
            together[place] = gradients(cases[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, expected in enumerate(alone):
        for one, other in zip(expected, together[place], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"topk": 1},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"threshold": 1.5},
        {"score_norm": "row"},
    ],
)
def test_constants_outside_their_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        AtomGate(**wrong)


def test_parts_that_do_not_fit_are_refused():
    keys, values, scaling = torch.zeros(3, 5), torch.zeros(3, 4), torch.ones(3)
    owner = torch.zeros(3, dtype=torch.int64)
    for wrong in (
        (keys[:2], values, scaling, owner),
        (keys, values[0], scaling, owner),
        (keys, values, scaling[:2], owner),
        (keys, values, scaling, owner.float()),
        (keys, values, scaling, owner, 4),
    ):
        with pytest.raises(MismatchError):
            AtomBank(*wrong)
    bank = AtomBank(keys, values, scaling, owner)
    with pytest.raises(MismatchError, match="atoms that map 5 to 4"):
        ModuleAtoms((Site(0, MODULE, "", 6, 4, 0, 4),), (bank,))
    with pytest.raises(MismatchError, match="0 sites"):
        ModuleAtoms((), ())
    site = Site(0, MODULE, "q", 5, 4, 0, 8)
    with pytest.raises(MismatchError, match="ascending"):
        ModuleAtoms((site, site), (bank, bank))
    assert len(BlockAtoms({}, SOFT, False).modules) == 0
