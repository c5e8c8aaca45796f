"""The one computation against loops over samples, tokens and adapters in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtool.adapters import mixing
from memtool.adapters.layout import Layout, Site
from memtool.adapters.mixing import Mix, Mixture
from memtool.adapters.picks import Picks
from memtool.adapters.values import AdapterValues, BlockValues
from memtool.errors import MismatchError

MODULE = "blocks.0.attn.qkv"
Kind = Literal["whole", "grouped", "chosen", "picked", "weighted", "ranked", "per token"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MIXES: tuple[Mix, ...] = ("delta", "params")
Kernel = Literal["dense", "formed", "mixed", "folded", "gathered", "blended"]
PICKED = 2
"""Adapters that a sample of kind picked uses; perhaps one of them twice."""


@dataclass
class Case:
    """One random problem: values, an input, a frozen output and the way of mixing."""

    layout: Layout
    flat: Tensor
    scaling: Tensor
    x: Tensor
    y: Tensor
    kind: Kind
    mix: Mix
    coefficients: Tensor
    index: Tensor
    picks: Tensor
    told_used: bool

    def values(self) -> AdapterValues:
        return AdapterValues.from_flat(self.flat, self.layout, self.scaling, trainable=True)

    def mixture(self, block: BlockValues, coefficients: Tensor) -> Mixture:
        match self.kind:
            case "whole":
                return Mixture.whole(block)
            case "grouped":
                return Mixture.grouped(block)
            case "chosen":
                return Mixture.chosen(block, self.index)
            case "picked":
                used = self.picks.unique() if self.told_used else None
                return Mixture.weighted(block, coefficients, self.mix, Picks(self.picks, used))
            case "ranked":
                return Mixture.ranked(block, coefficients)
            case _:
                return Mixture.weighted(block, coefficients, self.mix)


def sites_of(slices: str, width: int, rows: int) -> tuple[Site, ...]:
    if not slices:
        return (Site(0, MODULE, "", width, rows, 0, rows),)
    return tuple(Site(0, MODULE, s, width, rows, rows * "qkv".index(s), 3 * rows) for s in slices)


def make(
    kind: Kind,
    mix: Mix = "delta",
    *,
    slices: str = "qv",
    batch: int = 3,
    tokens: int | None = 4,
    adapters: int = 3,
    rank: int = 2,
    width: int = 5,
    rows: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    adapters = 1 if kind == "whole" else adapters
    batch = batch * adapters if kind == "grouped" else batch
    layout = Layout(sites_of(slices, width, rows), rank)
    lead = (batch,) if tokens is None else (batch, tokens)
    own = lead if kind == "per token" else (batch,)
    each = (adapters, rank) if kind == "ranked" else (adapters,)
    each = (PICKED,) if kind == "picked" else each
    return Case(
        layout,
        randn(adapters, layout.numel),
        randn(adapters),
        randn(*lead, width),
        randn(*lead, layout.sites[0].module_rows),
        kind,
        "delta" if kind == "ranked" else mix,
        randn(*own, *each),
        torch.randint(adapters, (batch,), generator=generator),
        torch.randint(adapters, (batch, PICKED), generator=generator),
        told_used=bool(seed % 2),
    )


def oracle(case: Case, flat: Tensor, x: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """The definition, one token and one adapter at a time; differentiable."""
    named = case.layout.unflatten(flat)
    count = len(flat)
    samples = []
    for sample in range(len(x)):
        rows = []
        for token in range(x.shape[1] if x.ndim == 3 else 1):
            at = (sample, token) if x.ndim == 3 else (sample,)
            match case.kind:
                case "whole":
                    weights = torch.ones(1, dtype=x.dtype)
                case "grouped":
                    weights = F.one_hot(torch.tensor(sample // (len(x) // count)), count)
                case "chosen":
                    weights = F.one_hot(case.index[sample], count)
                case "picked":
                    zeros = torch.zeros(count, dtype=x.dtype)
                    weights = zeros.index_add(0, case.picks[sample], coefficients[sample])
                case "weighted" | "ranked":
                    weights = coefficients[sample]
                case "per token":
                    weights = coefficients[at]
            out = y[at]
            for site in case.layout.sites:
                a, b = named[f"{site.name}.lora_A"], named[f"{site.name}.lora_B"]
                scaled = [w * s for w, s in zip(weights, case.scaling, strict=True)]
                if case.kind == "ranked":
                    diagonal = [
                        torch.diag(s * w) for s, w in zip(case.scaling, weights, strict=True)
                    ]
                    delta = sum(b[t] @ diagonal[t] @ a[t] for t in range(count))
                elif case.mix == "delta":
                    delta = sum(scaled[t] * (b[t] @ a[t]) for t in range(count))
                else:
                    left = sum(scaled[t] * b[t] for t in range(count))
                    delta = left @ sum(weights[t] * a[t] for t in range(count))
                before, after = site.first_row, site.first_row + site.out_features
                out = torch.cat([out[:before], out[before:after] + delta @ x[at], out[after:]])
            rows.append(out)
        samples.append(torch.stack(rows) if x.ndim == 3 else rows[0])
    return torch.stack(samples)


def check_forward_and_gradients(case: Case) -> None:
    flat = case.flat.clone().requires_grad_()
    x, y = case.x.clone().requires_grad_(), case.y.clone().requires_grad_()
    coefficients = case.coefficients.clone().requires_grad_()
    expected = oracle(case, flat, x, y, coefficients)
    direction = torch.sin(torch.arange(expected.numel(), dtype=x.dtype)).view_as(expected)
    inputs = [flat, x, y, coefficients]
    wanted = torch.autograd.grad(
        (expected * direction).sum(), inputs, allow_unused=True, materialize_grads=True
    )

    values = case.values()
    block = values.block(0)
    assert block is not None
    got = case.mixture(block, coefficients).add_to(y, x, MODULE)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(y, case.y, rtol=0, atol=0)
    torch.autograd.backward((got * direction).sum())
    for parameter in values.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    torch.testing.assert_close(values.flat(), wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, wanted[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y.grad, wanted[2], rtol=1e-9, atol=1e-9)
    if coefficients.grad is not None:
        torch.testing.assert_close(coefficients.grad, wanted[3], rtol=1e-9, atol=1e-9)
    else:
        assert case.kind in ("whole", "grouped", "chosen")

    with torch.no_grad():
        fresh = case.values().block(0)
        assert fresh is not None
        inplace = case.mixture(fresh, case.coefficients).add_to(case.y.clone(), case.x, MODULE)
    torch.testing.assert_close(inplace, expected.detach(), rtol=1e-9, atol=1e-10)


@given(
    kind=st.sampled_from(KINDS),
    mix=st.sampled_from(MIXES),
    slices=st.sampled_from(["", "q", "k", "v", "qk", "qv", "kv", "qkv", "vq"]),
    batch=st.integers(1, 3),
    tokens=st.none() | st.integers(1, 5),
    adapters=st.integers(1, 4),
    rank=st.integers(1, 3),
    width=st.integers(1, 6),
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None)
def test_every_mixture_is_the_loop(
    kind: Kind,
    mix: Mix,
    slices: str,
    batch: int,
    tokens: int | None,
    adapters: int,
    rank: int,
    width: int,
    rows: int,
    seed: int,
) -> None:
    check_forward_and_gradients(
        make(
            kind,
            mix,
            slices=slices,
            batch=batch,
            tokens=tokens,
            adapters=adapters,
            rank=rank,
            width=width,
            rows=rows,
            seed=seed,
        )
    )


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Make one kernel the cheapest, whatever the shapes."""

    def force_kernel(kernel: Kernel) -> None:
        costs = mixing.Costs(*(0.0 if name == kernel else 1.0 for name in mixing.Costs._fields))
        monkeypatch.setattr(mixing, "costs", lambda *_: costs)

    return force_kernel


@pytest.mark.parametrize("slices", ["", "qv", "k"])
@pytest.mark.parametrize("tokens", [None, 1, 4])
@pytest.mark.parametrize(
    ("kind", "mix", "kernel"),
    [
        ("chosen", "delta", "dense"),
        ("chosen", "delta", "gathered"),
        ("picked", "delta", "dense"),
        ("picked", "delta", "formed"),
        ("picked", "delta", "gathered"),
        ("picked", "params", "mixed"),
        ("picked", "params", "folded"),
        ("picked", "params", "blended"),
        ("weighted", "delta", "dense"),
        ("weighted", "delta", "formed"),
        ("ranked", "delta", "dense"),
        ("ranked", "delta", "formed"),
        ("weighted", "params", "mixed"),
        ("weighted", "params", "folded"),
    ],
)
def test_every_kernel_is_the_loop(
    force: Callable[[Kernel], None],
    kind: Kind,
    mix: Mix,
    kernel: Kernel,
    tokens: int | None,
    slices: str,
) -> None:
    force(kernel)
    check_forward_and_gradients(make(kind, mix, tokens=tokens, slices=slices))


def test_shapes_choose_the_kernel() -> None:
    def cheapest(adapters: int, tokens: int, width: int, names: set[str]) -> str:
        layout = Layout(sites_of("qv", width, width), 8)
        block = AdapterValues.from_flat(torch.zeros(adapters, layout.numel), layout, 1.0).block(0)
        assert block is not None
        cost = mixing.costs(torch.empty(32, tokens, width), block.modules[MODULE])._asdict()
        return min(names, key=lambda name: cost[name])

    assert cheapest(20, 197, 768, {"dense", "formed"}) == "dense"
    assert cheapest(200, 197, 192, {"dense", "formed"}) == "formed"
    assert cheapest(20, 197, 768, {"mixed", "folded"}) == "mixed"
    assert cheapest(20, 1, 768, {"mixed", "folded"}) == "folded"
    assert cheapest(50, 197, 768, {"dense", "gathered"}) == "gathered"
    assert cheapest(4, 1, 768, {"dense", "gathered"}) == "dense"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("among", [None, [0, 2, 3, 5, 6]])
def test_what_is_picked_of_sparse_coefficients_is_the_dense_mixture(
    mix: Mix, among: list[int] | None
) -> None:
    case = make("weighted", mix, batch=4, adapters=7)
    kept = torch.zeros(4, 7, dtype=torch.bool)
    kept[0, [2, 5]] = kept[1, [0, 2, 6]] = kept[3, 5] = True  # of the third sample nothing
    coefficients = (case.coefficients * kept).requires_grad_()
    block = case.values().block(0)
    assert block is not None
    places = None if among is None else torch.tensor(among)
    weights, picks = Picks.of(coefficients, places)
    assert picks.used is not None
    assert picks.used.tolist() == [0, 2, 5, 6]
    assert weights.shape == picks.index.shape == (4, 3)
    got = Mixture.weighted(block, weights, mix, picks)
    expected = Mixture.weighted(block, coefficients, mix)
    found, slopes = [], []
    for mixture in (got, got.dense(), expected):
        found.append(mixture.add_to(case.y, case.x, MODULE))
        (slope,) = torch.autograd.grad(found[-1].square().sum(), coefficients, retain_graph=True)
        slopes.append(slope * kept)
    for one, slope in zip(found[:2], slopes[:2], strict=True):
        torch.testing.assert_close(one, found[2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(slope, slopes[2], rtol=1e-9, atol=1e-9)


def test_nothing_is_picked_where_all_coefficients_are_zero() -> None:
    weights, picks = Picks.of(torch.zeros(3, 5))
    assert weights.tolist() == [[0.0]] * 3
    assert picks.index.tolist() == [[0]] * 3


@pytest.mark.parametrize("kernel", ["dense", "gathered"])
def test_adapters_that_are_not_picked_are_not_touched(
    force: Callable[[Kernel], None], kernel: Kernel
) -> None:
    force(kernel)
    case = make("picked", adapters=6, batch=2)
    case.flat[[0, 2, 4]] = torch.nan
    block = case.values().block(0)
    assert block is not None
    picks = Picks(torch.tensor([[1, 3], [5, 1]]), torch.tensor([1, 3, 5]))
    mixture = Mixture.weighted(block, case.coefficients, "delta", picks)
    assert mixture.add_to(case.y, case.x, MODULE).isfinite().all()


def add(case: Case, coefficients: Tensor, mix: Mix, x: Tensor | None = None) -> Tensor:
    block = case.values().block(0)
    assert block is not None
    mixture = Mixture.weighted(block, coefficients, mix)
    x = case.x if x is None else x
    return mixture.add_to(torch.zeros_like(case.y), x, MODULE).detach()


@pytest.mark.parametrize("tokens", [None, 4])
def test_one_hot_coefficients_recall_one_adapter_exactly(tokens: int | None) -> None:
    case = make("chosen", batch=4, adapters=3, tokens=tokens)
    one_hot = F.one_hot(case.index, 3).double()
    block = case.values().block(0)
    assert block is not None
    chosen = Mixture.chosen(block, case.index).add_to(torch.zeros_like(case.y), case.x, MODULE)
    torch.testing.assert_close(add(case, one_hot, "delta"), chosen.detach())
    torch.testing.assert_close(add(case, one_hot, "params"), chosen.detach())
    for sample, index in enumerate(case.index):
        single = AdapterValues.from_flat(
            case.flat[index, None], case.layout, case.scaling[index, None]
        ).block(0)
        assert single is not None
        alone = Mixture.whole(single).add_to(
            torch.zeros_like(case.y[sample, None]), case.x[sample, None], MODULE
        )
        torch.testing.assert_close(chosen[sample, None].detach(), alone)


def test_delta_is_linear_in_the_coefficients() -> None:
    case = make("weighted")
    one, two = case.coefficients, case.coefficients.flip(0)
    together = add(case, 2 * one - 3 * two, "delta")
    apart = 2 * add(case, one, "delta") - 3 * add(case, two, "delta")
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("kernel", ["dense", "formed"])
def test_one_weight_for_all_ranks_of_an_adapter_is_the_mixture_bit_for_bit(
    force: Callable[[Kernel], None], kernel: Kernel
) -> None:
    force(kernel)
    case = make("weighted", rank=3, tokens=4)
    block = case.values().block(0)
    assert block is not None
    each = case.coefficients.unsqueeze(-1).expand(-1, -1, 3)
    got = Mixture.ranked(block, each).add_to(case.y, case.x, MODULE)
    assert torch.equal(
        got, Mixture.weighted(block, case.coefficients).add_to(case.y, case.x, MODULE)
    )


def test_a_negative_coefficient_subtracts_under_delta_and_squares_under_params() -> None:
    case = make("weighted", adapters=1)
    one = torch.ones(3, 1, dtype=torch.float64)
    torch.testing.assert_close(add(case, -one, "delta"), -add(case, one, "delta"))
    torch.testing.assert_close(add(case, -one, "params"), add(case, one, "params"))
    torch.testing.assert_close(add(case, 3 * one, "params"), 9 * add(case, one, "params"))


@pytest.mark.parametrize("mix", MIXES)
def test_zero_coefficients_change_nothing(mix: Mix) -> None:
    case = make("weighted")
    assert not add(case, torch.zeros_like(case.coefficients), mix).any()


@pytest.mark.parametrize("mix", MIXES)
def test_coefficients_alike_for_all_tokens_are_those_of_the_sample(mix: Mix) -> None:
    case = make("weighted")
    per_token = case.coefficients.unsqueeze(1).expand(-1, 4, -1)
    torch.testing.assert_close(
        add(case, per_token, mix), add(case, case.coefficients, mix), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("mix", MIXES)
def test_a_merged_weight_gives_the_same_output(mix: Mix) -> None:
    case = make("weighted", mix, batch=1)
    named = case.layout.unflatten(case.flat)
    weight = torch.zeros(case.layout.sites[0].module_rows, 5, dtype=torch.float64)
    a, s = case.coefficients[0], case.scaling
    for site in case.layout.sites:
        left, right = named[f"{site.name}.lora_B"], named[f"{site.name}.lora_A"]
        rows = weight[site.first_row : site.first_row + site.out_features]
        if mix == "delta":
            rows += torch.einsum("t,tor,tri->oi", a * s, left, right)
        else:
            rows += torch.einsum("t,tor->or", a * s, left) @ torch.einsum("t,tri->ri", a, right)
    torch.testing.assert_close(add(case, case.coefficients, mix), F.linear(case.x, weight))


def test_grouped_adapters_equal_separate_runs() -> None:
    case = make("grouped", batch=2, adapters=3)
    values = case.values()
    block = values.block(0)
    assert block is not None
    together = Mixture.grouped(block).add_to(case.y, case.x, MODULE)
    torch.autograd.backward(together.square().sum())
    flat = []
    for i, (x, y) in enumerate(zip(case.x.chunk(3), case.y.chunk(3), strict=True)):
        single = AdapterValues.from_flat(
            case.flat[i, None], case.layout, case.scaling[i, None], trainable=True
        )
        alone_block = single.block(0)
        assert alone_block is not None
        alone = Mixture.whole(alone_block).add_to(y, x, MODULE)
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone)
        torch.autograd.backward(alone.square().sum())
        for parameter in single.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
        flat.append(single.flat())
    for parameter in values.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    torch.testing.assert_close(values.flat(), torch.cat(flat))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", MIXES)
def test_bfloat16_stays_close_to_float32(kind: Kind, mix: Mix) -> None:
    case = make(kind, mix, batch=4, tokens=9, adapters=5, rank=4, width=64, rows=64)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        values = AdapterValues.from_flat((case.flat / 8).to(dtype), case.layout, case.scaling)
        block = values.block(0)
        assert block is not None
        mixture = case.mixture(block, case.coefficients.float())
        y = mixture.add_to(case.y.to(dtype), case.x.to(dtype), MODULE)
        assert y.dtype == dtype
        outputs.append(y.float())
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert error < 0.01


def test_gradients_of_a_block_that_is_computed_again_for_backward() -> None:
    """Its two layers ask one mixture, which was asked without gradients before."""
    case = make("weighted", slices="", width=6)
    (site,) = case.layout.sites
    layout = Layout((site, replace(site, module="blocks.0.mlp.fc1")), case.layout.rank)
    values = AdapterValues.from_flat(case.flat.repeat(1, 2), layout, case.scaling, trainable=False)
    block = values.block(0)
    assert block is not None
    found = []
    for again in (True, False):
        coefficients = case.coefficients.clone().requires_grad_()
        mixture = Mixture.weighted(block, coefficients, "delta")

        def run(x: Tensor, mixture: Mixture = mixture) -> Tensor:
            for one in layout.sites:
                x = mixture.add_to(torch.zeros_like(x), x, one.module)
            return x

        if again:
            with torch.no_grad():
                run(case.x)
        out = checkpoint(run, case.x, use_reentrant=False) if again else run(case.x)
        out.square().sum().backward()
        found.append(coefficients.grad)
    assert found[1] is not None
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_more_token_dimensions_are_tokens() -> None:
    case = make("weighted", tokens=6)
    block = case.values().block(0)
    assert block is not None
    mixture = Mixture.weighted(block, case.coefficients)
    flat = mixture.add_to(case.y, case.x, MODULE)
    grid = mixture.add_to(case.y.view(3, 2, 3, -1), case.x.view(3, 2, 3, -1), MODULE)
    torch.testing.assert_close(grid.flatten(1, 2), flat)


def test_strided_inputs_and_outputs() -> None:
    case = make("weighted", tokens=4)
    block = case.values().block(0)
    assert block is not None
    mixture = Mixture.weighted(block, case.coefficients)
    expected = mixture.add_to(case.y, case.x, MODULE).detach()
    x, y = case.x.transpose(0, 1).contiguous(), case.y.transpose(0, 1).contiguous()
    with torch.no_grad():
        got = mixture.add_to(y.transpose(0, 1), x.transpose(0, 1), MODULE)
    torch.testing.assert_close(got, expected)


def test_a_module_without_a_site_stays_as_it_is() -> None:
    case = make("whole")
    block = case.values().block(0)
    assert block is not None
    assert Mixture.whole(block).add_to(case.y, case.x, "blocks.0.mlp.fc1") is case.y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", MIXES)
def test_an_empty_batch_stays_empty(kind: Kind, mix: Mix) -> None:
    case = make(kind, mix)
    block = case.values().block(0)
    assert block is not None
    case.index, case.picks = case.index[:0], case.picks[:0]
    mixture = case.mixture(block, case.coefficients[:0])
    assert mixture.add_to(case.y[:0], case.x[:0], MODULE).shape == (0, *case.y.shape[1:])


def test_wrong_shapes_are_refused() -> None:
    case = make("weighted", batch=4, adapters=3)
    block = case.values().block(0)
    assert block is not None
    x, y = case.x, case.y

    with pytest.raises(MismatchError, match="3 adapters for all samples"):
        Mixture.whole(block)
    with pytest.raises(MismatchError, match="coefficients of shape"):
        Mixture.weighted(block, case.coefficients[:, :2])
    with pytest.raises(MismatchError, match="coefficients of shape"):
        Mixture.weighted(block, case.coefficients[0])
    for each in (case.coefficients, torch.zeros(4, 3, 1), torch.zeros(4, 2, 2)):
        with pytest.raises(MismatchError, match=r"(?s)weights of ranks .* \(batch, 3, 2\)"):
            Mixture.ranked(block, each)
    with pytest.raises(MismatchError, match="delta"):
        Mixture.weighted(block, case.coefficients, "detla")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="int64"):
        Mixture.chosen(block, case.coefficients)
    with pytest.raises(MismatchError, match="0 to 3"):
        Mixture.chosen(block, torch.tensor([0, 3]))
    with pytest.raises(MismatchError, match="-1 to 0"):
        Mixture.chosen(block, torch.tensor([0, -1]))
    with pytest.raises(MismatchError, match="one for each adapter that is picked"):
        Mixture.weighted(block, case.coefficients, picks=Picks(torch.zeros(4, 2).long()))
    with pytest.raises(MismatchError, match="0 to 3"):
        Mixture.weighted(block, case.coefficients[:, :1], picks=Picks(torch.arange(4)[:, None]))
    with pytest.raises(MismatchError, match="groups"):
        Mixture.grouped(block).add_to(y, x, MODULE)

    mixture = Mixture.weighted(block, case.coefficients)
    for wrong_y, wrong_x in (
        (y[:2], x[:2]),
        (y[:, :2], x),
        (y[..., :-1], x),
        (y, x[..., :-1]),
        (y[0, 0], x[0, 0]),
    ):
        with pytest.raises(MismatchError, match=MODULE):
            mixture.add_to(wrong_y, wrong_x, MODULE)
    per_token = Mixture.weighted(block, case.coefficients.unsqueeze(1).expand(-1, 3, -1))
    with pytest.raises(MismatchError, match="tokens"):
        per_token.add_to(y, x, MODULE)


@pytest.mark.parametrize("kernel", ["dense", "gathered"])
def test_windows_of_a_sample_use_its_adapters(
    force: Callable[[Kernel], None], kernel: Kernel
) -> None:
    force(kernel)
    case = make("picked", batch=3, adapters=5, tokens=4)
    block = case.values().block(0)
    assert block is not None
    mixture = case.mixture(block, case.coefficients)
    wanted = mixture.add_to(case.y, case.x, MODULE)
    halves = case.y.unflatten(1, (2, 2)).flatten(0, 1), case.x.unflatten(1, (2, 2)).flatten(0, 1)
    found = mixture.over(6, MODULE).add_to(*halves, MODULE)
    torch.testing.assert_close(found.unflatten(0, (3, 2)).flatten(1, 2), wanted)
