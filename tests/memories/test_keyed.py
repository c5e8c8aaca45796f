"""Block memories: coefficients are separation(similarity(query, keys)), block by block."""

from itertools import product

import pytest
import torch
from torch import Tensor

from memtool.errors import MismatchError
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.query import QueryModule
from memtool.memories.separation import separation
from memtool.memories.similarity import SIMILARITIES, similarity
from memtool.registry import SHIPPED
from memtool.sections import MemorySettings, Separation, Similarity


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("alike", "separate"), list(product(SIMILARITIES, SHIPPED["separations"])))
def test_every_setting_is_the_composition(alike: Similarity, separate: Separation) -> None:
    settings = MemorySettings(similarity=alike, separation=separate, beta=2.0, topk=2, token="mean")
    keys, hidden = draw(2, 4, 9), draw(3, 5, 8, seed=1)
    memory = KeyedMemory.from_settings(settings, (0, 3), 8, keys)
    query = torch.cat(
        [torch.nn.functional.layer_norm(hidden[:, 1:].mean(1), (8,)), torch.ones(3, 1)], dim=1
    )
    for place, block in enumerate((0, 3)):
        scores = similarity(alike)(query, keys[place])
        torch.testing.assert_close(memory.scores(block, hidden), scores)
        expected = separation(separate, beta=2.0, topk=2)(scores)
        torch.testing.assert_close(memory.coefficients(block, hidden), expected)
        torch.testing.assert_close(memory[block](hidden), expected)
    assert torch.equal(memory.keys(), keys)


def test_the_last_entry_of_a_key_is_its_bias() -> None:
    keys = draw(1, 3, 9)
    settings = MemorySettings(similarity="dot", separation="identity", token="class")
    plain = KeyedMemory.from_settings(settings, (0,), 8, keys)
    raised = keys.clone()
    raised[0, 1, -1] += 2.5
    shifted = KeyedMemory.from_settings(settings, (0,), 8, raised)
    hidden = draw(4, 5, 8, seed=1)
    difference = shifted.coefficients(0, hidden) - plain.coefficients(0, hidden)
    torch.testing.assert_close(difference, torch.tensor([[0.0, 2.5, 0.0]]).expand(4, 3))


def test_keys_and_query_modules_learn_and_the_given_keys_stay() -> None:
    keys = draw(2, 3, 9)
    kept = keys.clone()
    memory = KeyedMemory.from_settings(MemorySettings(query="linear"), (0, 1), 8, keys)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.5)
    hidden, target = draw(6, 5, 8, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(
            torch.nn.functional.nll_loss(memory.coefficients(block, hidden).log(), target)
            for block in (0, 1)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert torch.equal(keys, kept)
    assert not torch.equal(memory.keys(), kept)
    assert not memory.keys().requires_grad


def test_state_round_trip() -> None:
    settings = MemorySettings(query="mlp")
    memory = KeyedMemory.from_settings(settings, (0, 1), 8, draw(2, 3, 9))
    other = KeyedMemory.from_settings(settings, (0, 1), 8, torch.zeros(2, 3, 9))
    other.load_state_dict(memory.state_dict())
    hidden = draw(2, 5, 8, seed=4)
    assert torch.equal(other.coefficients(1, hidden), memory.coefficients(1, hidden))


def test_bad_input_is_an_error_that_helps() -> None:
    settings = MemorySettings()
    with pytest.raises(MismatchError, match=r"\(2, adapters, 9\)"):
        KeyedMemory.from_settings(settings, (0, 1), 8, draw(1, 3, 9))
    with pytest.raises(MismatchError, match=r"\(adapters, 9\)"):
        KeyedMemory.from_settings(settings, (0,), 8, draw(1, 3, 8))
    with pytest.raises(MismatchError, match="at least one adapter"):
        KeyedMemory.from_settings(settings, (0,), 8, draw(1, 0, 9))
    with pytest.raises(MismatchError, match="one for each block"):
        KeyedMemory.from_settings(settings, (0, 0), 8, draw(2, 3, 9))
    memory = KeyedMemory.from_settings(settings, (0,), 8, draw(1, 3, 9))
    with pytest.raises(MismatchError, match="block 5 has no memory"):
        memory.coefficients(5, draw(2, 5, 8))
    block = memory[0]
    assert isinstance(block, BlockMemory)
    assert isinstance(block.query, QueryModule)
