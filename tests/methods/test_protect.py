"""What learning may not change: scores on past queries, by projection of the applied steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memtool.errors import CorruptError
from memtool.memories.dual_gpm import DualGPM
from memtool.memories.keyed import KeyedMemory
from memtool.methods.mira.method import Mira
from memtool.methods.mira.protect import KEYS, Protection
from memtool.sections import MemorySettings
from tests.methods.conftest import learn, small_config

DIM = 16


class Scoring(nn.Module):
    """A memory that is asked about hidden states as they are, in place of a whole backbone."""

    def __init__(self, memory: KeyedMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.memory.scores(block, hidden) for block in self.memory.blocks])


class Asked:
    """An engine that hands the inputs over."""

    def predict(self, model, images):
        with torch.inference_mode():
            return model(torch.from_numpy(images))


def memory_of(query: str, *, adapters: int = 3, seed: int = 0) -> KeyedMemory:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, adapters, DIM + 1, generator=generator)
    settings = MemorySettings(query=query, token="class", query_norm=False)
    memory = KeyedMemory.from_settings(settings, (0, 3), DIM, keys, generator=generator)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if not name.endswith(".keys"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return memory.double()


def hidden_states(seed: int, *, rank: int = 4, count: int = 40) -> Tensor:
    """Hidden states (count, 2 tokens, DIM) in a subspace of `rank` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, DIM, generator=generator, dtype=torch.float64)
    return torch.randn(count, 2, rank, generator=generator, dtype=torch.float64) @ basis


@pytest.mark.parametrize("query", ["identity", "linear"])
def test_old_scores_stay_where_they_were_whatever_adam_does(query):
    memory = memory_of(query)
    scoring, past_inputs, new_inputs = Scoring(memory), hidden_states(1), hidden_states(2)
    past = Protection()
    past.observe(Asked(), scoring, past_inputs.numpy(), start=1.0, progress=0.0)
    with torch.no_grad():
        old, new = scoring(past_inputs), scoring(new_inputs)
    take_back = past.guard(memory)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (scoring(new_inputs) - 1).square().mean().backward()
        optimizer.step()
        take_back()
    with torch.no_grad():
        assert torch.allclose(scoring(past_inputs), old, atol=1e-6)
        moved = (scoring(new_inputs) - 1).square().mean()
        assert moved < 0.5 * (new - 1).square().mean()


def test_a_projected_gradient_is_not_enough_for_adam():
    """The reason for projecting steps: the same learning with projected gradients drifts."""

    def drift(how: str) -> float:
        memory = memory_of("identity")
        scoring, past_inputs, new_inputs = Scoring(memory), hidden_states(1), hidden_states(2)
        past = Protection()
        past.observe(Asked(), scoring, past_inputs.numpy(), start=1.0, progress=0.0)
        old = scoring(past_inputs).detach()
        take_back = past.guard(memory)
        optimizer = torch.optim.Adam(memory.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            (scoring(new_inputs) - 1).square().mean().backward()
            if how == "gradient":
                for block in memory.blocks:
                    keys = memory[block].keys
                    keys.grad = past.pasts[f"{block}.{KEYS}"].project(keys.grad)
            optimizer.step()
            if how == "step":
                take_back()
        return float((scoring(past_inputs) - old).detach().norm() / old.norm())

    assert drift("step") < 1e-9 < 0.01 < drift("gradient") < drift("none")


def test_new_keys_start_where_past_queries_score_zero():
    memory = memory_of("identity")
    past = Protection()
    past.observe(Asked(), Scoring(memory), hidden_states(1).numpy(), start=1.0, progress=0.0)
    drawn = torch.randn(2, 5, DIM + 1, dtype=torch.float64)
    free = past.free_keys(memory.blocks, drawn)
    fresh = memory_of("identity", adapters=5)
    fresh.set_keys(free)
    assert Scoring(fresh)(hidden_states(1)).abs().max() < 1e-9
    assert Scoring(fresh)(hidden_states(2)).abs().max() > 0.1
    assert Protection().free_keys(memory.blocks, drawn) is drawn


def test_an_mlp_query_module_keeps_its_answers_as_well():
    memory = memory_of("mlp")
    scoring, past_inputs = Scoring(memory), hidden_states(1, rank=2, count=6)
    past = Protection()
    past.observe(Asked(), scoring, past_inputs.numpy(), start=1.0, progress=0.0)
    old = scoring(past_inputs).detach()
    take_back = past.guard(memory)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(scoring(past_inputs), old, atol=1e-3)
    take_back()
    assert torch.allclose(scoring(past_inputs), old, atol=1e-8)


def test_bytes_and_back():
    past = Protection()
    past.observe(
        Asked(), Scoring(memory_of("linear")), hidden_states(1).numpy(), start=0.9, progress=0.5
    )
    again = Protection.from_bytes(past.to_bytes(), "here")
    assert set(again.pasts) == set(past.pasts) == {"0.keys", "0.g", "3.keys", "3.g"}
    for name, one in past.pasts.items():
        assert torch.equal(again.pasts[name].basis, one.basis)
        assert (again.pasts[name].kind, again.pasts[name].start) == (one.kind, one.start)
    assert Protection.from_bytes(Protection().to_bytes(), "here").pasts == {}
    named = Protection({"a": DualGPM(3)}).to_bytes()
    for data in (b"", b"nothing", named.replace(b"remove", b"forget")):
        with pytest.raises(CorruptError, match=r"^here "):
            Protection.from_bytes(data, "here")


def learned_in_turn(folder, protect, **more):
    settings = {
        "memory__separation": "identity",
        "memory__scope": "block",
        "consolidate__keys": "random",
        "consolidate__epochs": 2,
        "consolidate__protect": protect,
        "consolidate__energy": 0.99,
        **more,
    }
    return learn(Mira.open(small_config(folder, **settings), seed=0))


def test_drift_of_old_coefficients_with_and_without_protection(adapted):
    drift = {}
    for protect in ("none", "freeze", "dual-gpm"):
        mira = learned_in_turn(adapted, protect, store=str(adapted / protect))
        metrics = mira.evaluate(history=True).row("memory").metrics
        drift[protect] = (metrics["coefficient_drift"], metrics["new_coefficients"])
    assert drift["dual-gpm"][0] < 0.2 * drift["none"][0]
    # Frozen keys give the same scores, but later keys answer to old inputs all the same.
    assert drift["dual-gpm"][1] < 0.5 * drift["freeze"][1]


@pytest.mark.parametrize("query", ["linear", "mlp"])
def test_frozen_keys_and_query_modules_stay_bit_for_bit(adapted, query):
    mira = learned_in_turn(adapted, "freeze", memory__query=query)
    store = mira.workspace.store
    consolidated = [v for v in store.log() if v.message.startswith("consolidate")]
    first, last = store.view(consolidated[-1].id), store.view(consolidated[0].id)
    assert np.array_equal(last.keys()[:, : first.keys().shape[1]], first.keys())
    assert last.blob("query-modules") == first.blob("query-modules")


def test_mean_queries_start_in_the_free_space_under_protection(adapted):
    mira = learned_in_turn(
        adapted, "dual-gpm", consolidate__keys="mean-query", consolidate__epochs=0
    )
    store = mira.workspace.store
    versions = [v.id for v in store.log() if v.message.startswith("consolidate")]
    later, earlier = (store.view(version) for version in versions[:2])
    assert np.array_equal(later.keys()[:, :2], earlier.keys())
    past = Protection.from_bytes(earlier.blob("past-queries"), "here")
    block = mira.snapshot().model.memory.blocks[0]
    new = torch.from_numpy(later.keys()[0, 2].copy())
    assert torch.allclose(past.pasts[f"{block}.{KEYS}"].project(new), new, atol=1e-5)
