"""Query modules: pooling, the identity start, and the constant that meets a key's bias."""

import pytest
import torch
from torch import Tensor

from memtool.errors import ConfigError, MismatchError
from memtool.memories.query import QueryModule

KINDS = ("identity", "linear", "mlp")


def hidden_states() -> Tensor:
    return 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", ["class", "mean"])
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_starts_as_the_pooled_token(kind: str, token: str, prefix: int, norm: bool) -> None:
    hidden = hidden_states()
    pooled = hidden[:, 0] if token == "class" else hidden[:, prefix:].sum(1) / (5 - prefix)
    if norm:
        pooled = (pooled - pooled.mean(1, keepdim=True)) / (
            pooled.var(1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
    module = QueryModule(kind, 8, token, norm=norm, prefix_tokens=prefix)
    query = module(hidden)
    torch.testing.assert_close(query[:, :-1], pooled)
    assert torch.equal(query[:, -1], torch.ones(2))
    assert torch.equal(module.bare(hidden), query[:, :-1])
    without = QueryModule(kind, 8, token, norm=norm, prefix_tokens=prefix, bias=False)
    assert torch.equal(without(hidden), query[:, :-1])
    assert (module.width, without.width) == (9, 8)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_learns_away_from_the_identity(kind: str) -> None:
    hidden = hidden_states()
    module = QueryModule(kind, 8, generator=torch.Generator().manual_seed(1))
    before = module(hidden)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(hidden).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(module(hidden), before)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert torch.equal(module(hidden)[:, -1], torch.ones(2))


def test_the_generator_decides_every_random_number() -> None:
    state = torch.get_rng_state()
    one = QueryModule("mlp", 8, generator=torch.Generator().manual_seed(3)).state_dict()
    two = QueryModule("mlp", 8, generator=torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_float32_for_bfloat16_input_under_autocast(kind: str) -> None:
    hidden = hidden_states().bfloat16()
    module = QueryModule(kind, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = module(hidden)
    assert query.dtype == torch.float32
    torch.testing.assert_close(query, module(hidden.float()))


def test_bad_input_is_an_error_that_helps() -> None:
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        QueryModule("liner", 8)
    with pytest.raises(ConfigError, match="unknown query token"):
        QueryModule("identity", 8, "first")
    with pytest.raises(ConfigError, match="without class token"):
        QueryModule("identity", 8, "class", prefix_tokens=0)
    with pytest.raises(MismatchError, match=r"\(batch, tokens, 8\)"):
        QueryModule("identity", 8)(torch.zeros(2, 5, 7))
