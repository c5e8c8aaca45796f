"""Scores of all atoms in bfloat16: what is kept is scored exactly, the choice alone may differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.adapters import atoms as atoms_file
from memtool.adapters.atoms import (
    AtomBank,
    AtomGate,
    ModuleAtoms,
    ScoreNorm,
    activations,
    add_atoms,
)
from memtool.errors import ConfigError
from tests.adapters.test_atoms import Case, gap_after, make, oracle
from tests.fake_device import FakeDevice

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module", autouse=True)
def _always() -> object:
    """In small banks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atoms_file, "WORTH", 0)
        yield


def rough(gate: AtomGate) -> AtomGate:
    return replace(gate, scores="bf16")


def told_apart(counts: tuple[int, ...], rank: int, seed: int) -> Case:
    """Atoms and tokens whose responses bfloat16 holds exactly: no two of a bank are equal."""
    generator = torch.Generator().manual_seed(seed)
    case = make(counts, rank=rank, seed=seed, learns=False)
    width = case.x.shape[-1]

    def distinct(count: int) -> Tensor:
        signs = 1 - 2 * torch.randint(2, (count,), generator=generator)
        return (torch.randperm(count, generator=generator) + 1) * signs / 16

    for bank in case.banks:
        for column in range(width):
            bank.keys[:, column] = distinct(len(bank))
    place = torch.randint(width, case.x.shape[:-1], generator=generator)
    case.x = torch.nn.functional.one_hot(place, width) * 2 * case.x.sum(-1, keepdim=True).sign()
    return case


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rank=st.integers(1, 5),
    topk=st.integers(2, 6),
    scaled=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_where_bfloat16_is_exact_it_is_the_loop(
    counts: list[int], rank: int, topk: int, scaled: bool, training: bool, seed: int
) -> None:
    case = told_apart(tuple(counts), rank, seed)
    gate = rough(AtomGate(topk, 0.4, 0.25, scaled_threshold=scaled))
    if any(len(bank) and gap_after(case.x, bank, gate) < 1e-9 for bank in case.banks):
        return  # of two equal scores either may be kept
    with torch.no_grad():
        found = add_atoms(case.y.clone(), case.x, case.atoms(), gate, training=training)
    expected = oracle(case, gate, training)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def nearly_alike(alike: int, topk: int) -> tuple[AtomBank, Tensor, list[int]]:
    """A bank with so many keys that bfloat16 holds for one, a token, and the highest of them."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(30, 16, generator=generator) / 16
    first = torch.full((16,), 0.5)
    near = first + 1e-5 * torch.arange(1, alike + 1).unsqueeze(1)
    order = torch.randperm(30, generator=generator)
    keys = torch.cat([near, keys[alike:]])[order]
    highest = [order.tolist().index(place) for place in range(alike - topk, alike)]
    bank = AtomBank(keys, keys.clone(), torch.ones(30), torch.arange(30) // 5)
    return bank, torch.ones(1, 1, 16), sorted(highest)


def kept(bank: AtomBank, x: Tensor, gate: AtomGate) -> list[int]:
    return activations(x, bank, gate, training=True)[0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize("topk", [2, 5])
def test_atoms_that_bfloat16_does_not_tell_apart_are_told_by_exact_scores(
    topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = AtomGate(topk, 1.0, -1.0)
    bank, x, highest = nearly_alike(2 * topk, topk)
    assert kept(bank, x, gate) == kept(bank, x, rough(gate)) == highest
    # More of them than are scored again: others may be kept, which are as near.
    bank, x, highest = nearly_alike(4 * topk, topk)
    others = kept(bank, x, rough(gate))
    assert kept(bank, x, gate) == highest
    assert len(others) == topk
    torch.testing.assert_close(
        bank.keys[others].sum(1), bank.keys[highest].sum(1), rtol=1e-3, atol=0
    )
    monkeypatch.setattr(atoms_file, "CANDIDATES", 4)
    assert kept(bank, x, rough(gate)) == highest


def test_what_atoms_add_is_near_where_the_same_are_kept() -> None:
    case = make((90,), rank=6, width=24, rows=5, tokens=20, learns=False, dtype=torch.float32)
    gate = AtomGate(4, 0.1, -1.0)
    (bank,) = case.banks
    same = [kept(bank, x, gate) == kept(bank, x, rough(gate)) for x in case.x[0, :, None, None]]
    assert sum(same) >= 19
    zero = torch.zeros_like(case.y[:1, same])
    with torch.no_grad():
        exact, near = (
            add_atoms(zero.clone(), case.x[:1, same], case.atoms(), one)
            for one in (gate, rough(gate))
        )
    assert 0 < (near - exact).norm() < 1e-3 * exact.norm()  # their norm is of rough responses


def test_small_banks_gradients_and_other_types_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(
        dtype: torch.dtype = torch.float32, grad: bool = False, score_norm: ScoreNorm = "bank"
    ) -> bool:
        case = make((60,), rank=6, width=24, dtype=dtype, learns=grad)
        with torch.set_grad_enabled(grad):
            gate = AtomGate(4, 0.1, score_norm=score_norm)
            found = [
                add_atoms(case.y.clone(), case.x, case.atoms(), one) for one in (gate, rough(gate))
            ]
        return torch.equal(*found)

    assert not same()
    assert same(grad=True)
    assert same(torch.bfloat16)
    assert same(score_norm="task")
    monkeypatch.setattr(atoms_file, "WORTH", 16)
    assert same()


def test_rough_keys_of_frozen_atoms_are_made_once() -> None:
    case = make((30,), learns=False)
    (learns,) = case.banks
    frozen, learning = (
        ModuleAtoms(case.sites, (bank,)) for bank in (replace(learns, fresh=0), learns)
    )
    assert frozen.rough_keys() is frozen.rough_keys()
    assert learning.rough_keys() is not learning.rough_keys()
    assert torch.equal(learning.rough_keys(), case.banks[0].keys.bfloat16())


def test_no_other_scores() -> None:
    with pytest.raises(ConfigError, match="bf61"):
        AtomGate(scores="bf61")  # type: ignore[arg-type]


@torch.no_grad()
def test_on_a_device_nothing_waits_and_nothing_is_float64() -> None:
    case = make((50, 40), rank=4, learns=False, dtype=torch.float32)
    with FakeDevice("cuda") as device:
        banks = tuple(
            AtomBank(*(part.to(device.device) for part in (b.keys, b.values, b.scaling, b.owner)))
            for b in case.banks
        )
        x, y = case.x.to(device.device), case.y.to(device.device)
        device.waits.clear()
        atoms = ModuleAtoms(case.sites, banks)
        assert add_atoms(y, x, atoms, rough(AtomGate(3))).shape == y.shape
        assert device.waits == {}
        assert device.doubles == {}


def test_a_pass_is_one_graph() -> None:
    case = make((50, 40), rank=4, learns=False, dtype=torch.float32)
    gate, atoms = rough(AtomGate(3, 0.1, 0.1)), case.atoms()

    def added(x: Tensor, y: Tensor) -> Tensor:
        return add_atoms(y, x, atoms, gate)

    torch._dynamo.reset()
    compiled = torch.compile(added, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = (one(case.x, case.y.clone()) for one in (compiled, added))
    torch.testing.assert_close(found, expected)
