"""The growing memory of atoms: what is frozen stays, what the store keeps comes back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.layout import Layout, Site
from memtool.errors import MismatchError, NotFoundError
from memtool.memories.rank1 import AtomBank, AtomGate, Rank1Memory, activations, init_atoms

WIDTH, ROWS = 12, 8
QKV, FC = "blocks.0.attn.qkv", "blocks.1.mlp.fc1"
SITES = (
    *(Site(0, QKV, s, WIDTH, ROWS, ROWS * i, 3 * ROWS) for i, s in enumerate("qkv")),
    Site(1, FC, "", WIDTH, 2 * ROWS, 0, 2 * ROWS),
)
NAMES = [site.name for site in SITES]
GATE = AtomGate(topk=3, temperature=0.2)


def flat(rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(Layout(SITES, rank).numel, generator=generator)


def outputs(memory: Rank1Memory, x: Tensor) -> dict[str, Tensor]:
    """What every module adds to zero."""
    recall = memory.recall(GATE)
    found = {}
    for block, module, rows in ((0, QKV, 3 * ROWS), (1, FC, 2 * ROWS)):
        mixture = recall(block, x)
        assert mixture is not None
        found[module] = mixture.add_to(torch.zeros(*x.shape[:-1], rows), x, module)
    return found


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))


def test_fresh_atoms_change_nothing_and_are_kaiming_uniform(x):
    wide = (Site(0, "fc", "", 400, 3, 0, 3),)
    layout = Layout(wide, 50)
    tensors = layout.unflatten(init_atoms(layout, generator=torch.Generator().manual_seed(1)))
    reference = torch.empty(50, 400)
    torch.nn.init.kaiming_uniform_(
        reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(2)
    )
    keys = tensors["fc.lora_A"]
    assert float(keys.abs().max()) == pytest.approx(float(reference.abs().max()), rel=1e-3)
    assert float(keys.std()) == pytest.approx(float(reference.std()), rel=0.02)
    assert not tensors["fc.lora_B"].any()
    memory = Rank1Memory(SITES)
    start = init_atoms(Layout(SITES, 4), generator=torch.Generator().manual_seed(1))
    memory.grow(start, rank=4, owner=0)
    assert not any(out.any() for out in outputs(memory, x).values())


def test_an_empty_memory_changes_nothing(x):
    memory = Rank1Memory(SITES)
    assert len(memory) == 0
    assert not any(out.any() for out in outputs(memory, x).values())
    assert memory.recall(GATE)(5, x) is None
    assert list(memory.parameters()) == []


def test_growing_freezes_what_is_there_and_only_the_newest_learn(x):
    memory = Rank1Memory(SITES)
    memory.grow(flat(2, 1), rank=2, owner=0, scaling=2.0)
    memory.grow(flat(3, 2), rank=3, owner=1, scaling=0.5)
    assert len(memory) == 5
    assert memory.fresh_rank == 3
    bank = memory.bank(NAMES[1])
    assert bank.owner.tolist() == [0, 0, 1, 1, 1]
    assert bank.scaling.tolist() == [2.0, 2.0, 0.5, 0.5, 0.5]
    assert bank.fresh == 3
    before = {name: memory.bank(name).keys.detach().clone() for name in NAMES}
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1, weight_decay=0.1)
    memory.train()
    for _ in range(3):
        optimizer.zero_grad()
        sum(out.square().sum() for out in outputs(memory, x).values()).backward()
        optimizer.step()
    for name in NAMES:
        after = memory.bank(name).keys
        assert torch.equal(after[:2], before[name][:2])
        assert (after[2:] != before[name][2:]).any(dim=1).all()


def test_keys_that_are_fixed_learn_nothing(x):
    memory = Rank1Memory(SITES)
    memory.grow(flat(2, 1), rank=2, owner=0)
    memory.grow(flat(3, 2), rank=3, owner=1, keys_learn=False)
    memory.train()
    sum(out.square().sum() for out in outputs(memory, x).values()).backward()
    assert all(keys.grad is None for keys in memory.fresh_keys)
    assert all(values.grad is not None for values in memory.fresh_values)
    torch.testing.assert_close(memory.fresh(), flat(3, 2))


def test_what_learns_goes_out_and_comes_in_as_a_flat_value():
    memory = Rank1Memory(SITES)
    value = flat(3, 4)
    memory.grow(value, rank=3, owner=0)
    assert torch.equal(memory.fresh(), value)
    memory.freeze()
    assert memory.fresh_rank == 0
    with pytest.raises(NotFoundError):
        memory.fresh()
    layout = Layout(SITES, 3)
    tensors = layout.unflatten(value)
    again = Rank1Memory(SITES)
    for name in NAMES:
        keys, values = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"].t()
        owner = torch.zeros(3, dtype=torch.int64)
        again.append(name, AtomBank(keys, values, torch.ones(3), owner))
        for part in ("keys", "values", "scaling", "owner"):
            one, other = (getattr(m.bank(name), part) for m in (memory, again))
            assert torch.equal(one, other)


def test_freezing_changes_no_output(x):
    memory = Rank1Memory(SITES).eval()
    memory.grow(flat(3, 4), rank=3, owner=0)
    before = outputs(memory, x)
    memory.freeze()
    after = outputs(memory, x)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(out.requires_grad for out in after.values())


def test_the_threshold_is_off_while_the_memory_trains(x):
    memory = Rank1Memory(SITES)
    memory.grow(flat(8, 4), rank=8, owner=0)
    memory.freeze()
    gate = AtomGate(topk=8, temperature=0.5, threshold=0.5)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    z = F.linear(x, memory.bank(FC).keys)
    weights = {mode: activations(x, memory.bank(FC), gate, training=mode) for mode in (True, False)}
    values = memory.bank(FC).values
    for training in (True, False):
        mixture = memory.train(training).recall(gate)(1, x)
        assert mixture is not None
        found = mixture.add_to(torch.zeros(2, 5, 2 * ROWS), x, FC)
        torch.testing.assert_close(found, (weights[training] * z) @ values)
    assert not torch.equal(weights[True], weights[False])


def test_banks_may_differ_where_atoms_were_pruned(x):
    memory = Rank1Memory(SITES)
    memory.grow(flat(4, 4), rank=4, owner=0)
    memory.freeze()
    pruned = Rank1Memory(SITES)
    for name in NAMES:
        bank, kept = memory.bank(name), slice(0, 1 if name == NAMES[1] else 4)
        pruned.append(name, AtomBank(*(t[kept] for t in parts(bank))))
    q, k, v = outputs(memory, x)[QKV].chunk(3, dim=-1)
    other_q, other_k, other_v = outputs(pruned, x)[QKV].chunk(3, dim=-1)
    torch.testing.assert_close((q, v), (other_q, other_v))
    assert not torch.equal(k, other_k)


def parts(bank: AtomBank) -> tuple[Tensor, ...]:
    return bank.keys, bank.values, bank.scaling, bank.owner


def test_moving_and_copying_keep_the_atoms(x):
    memory = Rank1Memory(SITES).eval()
    memory.grow(flat(3, 4), rank=3, owner=0)
    memory.freeze()
    expected = outputs(memory, x)
    for other in (copy.deepcopy(memory), memory.double()):
        assert torch.equal(other.bank(FC).keys.float(), memory.bank(FC).keys.float())
    found = outputs(memory, x.double())
    for name, out in expected.items():
        torch.testing.assert_close(found[name].float(), out, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    memory = Rank1Memory(SITES)
    with pytest.raises(MismatchError, match="backbone"):
        memory.grow(flat(2, 1), rank=3, owner=0)
    memory.grow(flat(2, 1), rank=2, owner=0)
    with pytest.raises(MismatchError, match="task 0"):
        memory.grow(flat(2, 1), rank=2, owner=0)
    with pytest.raises(MismatchError, match="freeze"):
        memory.append(FC, memory.bank(FC))
    memory.freeze()
    with pytest.raises(NotFoundError, match="qkv"):
        memory.bank(QKV)
    bank = memory.bank(FC)
    with pytest.raises(MismatchError, match="backbone"):
        memory.append(NAMES[0], bank)
    with pytest.raises(MismatchError):
        Rank1Memory(())
    with pytest.raises(MismatchError):
        Rank1Memory((SITES[0], SITES[0]))


def test_a_k_that_the_user_chose_may_not_be_larger_than_the_bank():
    memory = Rank1Memory(SITES)
    memory.grow(flat(4, 1), rank=4, owner=0)
    memory.check_topk(4)
    with pytest.raises(MismatchError, match="topk of 5 with 4 atoms"):
        memory.check_topk(5)
