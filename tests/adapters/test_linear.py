"""The adapted layer inside a model: frozen weights, autocast, checkpointing, compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtool.adapters.layout import Layout, Site
from memtool.adapters.linear import AdaptedLinear
from memtool.adapters.mixing import Mixture
from memtool.adapters.picks import Picks
from memtool.adapters.values import AdapterValues, BlockValues, Recall
from memtool.errors import MismatchError

WIDTH, ADAPTERS, BATCH, TOKENS = 16, 3, 6, 5
QKV, OUT = "blocks.0.attn.qkv", "blocks.0.attn.proj"
LAYOUT = Layout(
    (
        Site(0, QKV, "q", WIDTH, WIDTH, 0, 3 * WIDTH),
        Site(0, QKV, "v", WIDTH, WIDTH, 2 * WIDTH, 3 * WIDTH),
        Site(0, OUT, "", WIDTH, WIDTH, 0, WIDTH),
    ),
    rank=4,
)

Choose = Callable[[BlockValues, Tensor], Mixture]
MIXTURES: dict[str, Choose] = {
    "whole": lambda block, _: Mixture.whole(block),
    "grouped": lambda block, _: Mixture.grouped(block),
    "chosen": lambda block, x: Mixture.chosen(block, torch.arange(len(x)) % ADAPTERS),
    "picked": lambda block, x: Mixture.weighted(block, score(x).mean(1)[:, :2], picks=two(x)),
    "delta": lambda block, x: Mixture.weighted(block, score(x).mean(1), "delta"),
    "params": lambda block, x: Mixture.weighted(block, score(x).mean(1), "params"),
    "delta per token": lambda block, x: Mixture.weighted(block, score(x), "delta"),
    "params per token": lambda block, x: Mixture.weighted(block, score(x), "params"),
}


def score(x: Tensor) -> Tensor:
    return torch.softmax(x[..., :ADAPTERS].float(), dim=-1)


def two(x: Tensor) -> Picks:
    """Two neighbours for every sample."""
    places = torch.arange(len(x)).unsqueeze(1) + torch.arange(2)
    return Picks(places % ADAPTERS, torch.arange(ADAPTERS))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A block in miniature: it asks for its mixture once and hands it to its layers."""

    def __init__(self) -> None:
        super().__init__()
        qkv, out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            for seed, parameter in enumerate((*qkv.parameters(), *out.parameters())):
                parameter.copy_(randn(*parameter.shape, seed=seed) / 4)
        self.qkv, self.out = AdaptedLinear(qkv, QKV), AdaptedLinear(out, OUT)

    def forward(self, x: Tensor, recall: Recall | None = None) -> Tensor:
        mixture = recall(0, x) if recall else None
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,)), mixture).chunk(3, dim=-1)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v), mixture)
        return x + mixed


def adapters(name: str, *, trainable: bool = False) -> AdapterValues:
    count = 1 if name == "whole" else ADAPTERS
    flat = randn(count, LAYOUT.numel, seed=9) / 4
    return AdapterValues.from_flat(flat, LAYOUT, 0.5, trainable=trainable)


def recall_of(name: str, values: AdapterValues) -> Recall:
    def recall(block: int, hidden: Tensor) -> Mixture | None:
        found = values.block(block)
        return None if found is None else MIXTURES[name](found, hidden)

    return recall


def test_it_is_the_linear_layer_until_a_mixture_comes() -> None:
    linear = nn.Linear(4, 7)
    adapted = AdaptedLinear(linear, "fc")
    x = randn(2, 3, 4)
    torch.testing.assert_close(adapted(x), linear(x), rtol=0, atol=0)
    assert list(adapted.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
    assert adapted.weight is linear.weight
    assert not any(p.requires_grad for p in adapted.parameters())
    assert list(AdaptedLinear(nn.Linear(4, 7, bias=False), "fc").state_dict()) == ["weight"]
    assert repr(adapted) == "AdaptedLinear(fc, in_features=4, out_features=7, bias=True)"


def test_wrong_width_is_named() -> None:
    block = adapters("whole").block(0)
    assert block is not None
    layer = AdaptedLinear(nn.Linear(WIDTH, WIDTH), QKV)
    with pytest.raises(MismatchError, match=QKV):
        layer(randn(2, WIDTH), Mixture.whole(block))


@pytest.mark.parametrize("name", MIXTURES)
def test_inference_equals_training_and_leaves_the_input_alone(name: str) -> None:
    block, recall = Block(), recall_of(name, adapters(name))
    x = randn(BATCH, TOKENS, WIDTH, seed=3)
    before = x.clone()
    expected = block(x, recall)
    assert not torch.allclose(expected, block(x))
    with torch.inference_mode():
        torch.testing.assert_close(block(x, recall), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", MIXTURES)
def test_autocast_runs_in_bfloat16_with_float32_gradients(name: str) -> None:
    block, values = Block(), adapters(name, trainable=True)
    x = randn(BATCH, TOKENS, WIDTH, seed=3).requires_grad_()
    gradients: list[Tensor] = []
    for enabled in (False, True):
        values.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = block(x, recall_of(name, values))
        torch.autograd.backward(y.float().square().sum())
        assert x.grad is not None
        grads = [parameter.grad for parameter in values.parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        gradients.append(torch.cat([grad.flatten() for grad in (*grads, x.grad)]))
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


@pytest.mark.parametrize("name", MIXTURES)
def test_autocast_touches_no_type_but_that_of_the_output(name: str) -> None:
    values = adapters(name).block(0)
    assert values is not None
    x, y = randn(BATCH, TOKENS, WIDTH), randn(BATCH, TOKENS, 3 * WIDTH, seed=1)
    mixture = MIXTURES[name](values, x)
    expected = mixture.add_to(y, x, QKV)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixture.add_to(y, x, QKV), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    block, values = Block(), adapters(name, trainable=True)
    x = randn(BATCH, TOKENS, WIDTH, seed=3).requires_grad_()
    results: list[list[Tensor | None]] = []

    def plain(hidden: Tensor) -> Tensor:
        y: Tensor = block(hidden, recall_of(name, values))
        return y

    def checkpointed(hidden: Tensor) -> Tensor:
        y: Tensor = checkpoint(plain, hidden, use_reentrant=False)
        return y

    for run in (plain, checkpointed):
        values.zero_grad()
        x.grad = None
        y = run(x)
        torch.autograd.backward(y.square().sum())
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad for p in values.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_one_graph_under_compile(name: str, grad: bool) -> None:
    block, values = Block(), adapters(name, trainable=True)
    recall = recall_of(name, values)
    x = randn(BATCH, TOKENS, WIDTH, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        expected, got = block(x, recall), compiled(x, recall)
    torch.testing.assert_close(got, expected)
    if grad:
        wanted = torch.autograd.grad(expected.square().sum(), list(values.parameters()))
        found = torch.autograd.grad(got.square().sum(), list(values.parameters()))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta", "params", "chosen"])
def test_the_compiled_code_gives_the_same_numbers(name: str) -> None:
    block, values = Block(), adapters(name)
    recall = recall_of(name, values)
    x = randn(BATCH, TOKENS, WIDTH, seed=3)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(block, fullgraph=True)(x, recall), block(x, recall)
        )
