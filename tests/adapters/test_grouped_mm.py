"""Picked adapters by one product of groups of rows, against the loop over samples in float64.

The product is torch's on a CPU, which takes float32; what decides that it runs is put aside.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtool import devices
from memtool.adapters import grouped_mm, mixing
from memtool.adapters.layout import Layout
from memtool.adapters.mixing import Mixture, told_kernels
from memtool.adapters.picks import Picks, Sorted
from memtool.adapters.values import AdapterValues, BlockValues, ModuleValues
from tests.adapters.test_mixing import MODULE, Case, make, oracle, sites_of
from tests.fake_device import FakeDevice

pytestmark = [
    pytest.mark.skipif(
        not hasattr(nn.functional, "grouped_mm"), reason="this torch multiplies no groups"
    ),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


COSTS = mixing.costs


@pytest.fixture(scope="module", autouse=True)
def _grouped() -> object:
    """Wherever it fits, the cheapest by far; in float32, and never in float64."""
    costs = mixing.Costs(*(1e30 * (name != "grouped_mm") for name in mixing.Costs._fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "costs", lambda *_: costs)
        patch.setattr(grouped_mm, "multiplies_groups", lambda dtype, _: dtype.itemsize < 8)
        yield


def block_of(case: Case) -> tuple[AdapterValues, BlockValues]:
    values = case.values()
    block = values.block(0)
    assert block is not None
    return values, block


def check(case: Case) -> None:
    """Forward with and without gradients, and all gradients; `case` is float32."""
    exact = replace(case, scaling=case.scaling.double())
    given = (case.flat, case.x, case.y, case.coefficients)
    leaves = [tensor.double().requires_grad_() for tensor in given]
    expected = oracle(exact, *leaves)
    pull = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).view_as(expected)
    wanted = torch.autograd.grad(
        (expected * pull).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}

    values, block = block_of(case)
    x, y, coefficients = (tensor.clone().requires_grad_() for tensor in given[1:])
    ran: set[str] = set()
    with told_kernels(ran):
        got = case.mixture(block, coefficients).add_to(y, x, MODULE)
        assert ran == {"grouped_mm"}
    torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(y, case.y, rtol=0, atol=0)
    torch.autograd.backward((got * pull.float()).sum())
    for parameter in values.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    torch.testing.assert_close(values.flat(), wanted[0], **close)
    torch.testing.assert_close(x.grad, wanted[1], **close)
    torch.testing.assert_close(y.grad, wanted[2], **close)
    if case.kind == "picked":
        torch.testing.assert_close(coefficients.grad, wanted[3], **close)

    with torch.no_grad():
        into = case.y.clone()
        quiet = case.mixture(block_of(case)[1], case.coefficients).add_to(into, case.x, MODULE)
    torch.testing.assert_close(quiet, expected, **close)
    assert quiet.data_ptr() == into.data_ptr()


@given(
    kind=st.sampled_from(["chosen", "picked"]),
    slices=st.sampled_from(["", "q", "k", "v", "qk", "qv", "kv", "qkv", "vq"]),
    batch=st.integers(1, 4),
    tokens=st.none() | st.integers(1, 4),
    adapters=st.integers(1, 5),
    rank=st.integers(1, 6),
    width=st.integers(1, 3),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_groups_of_rows_are_the_loop(
    kind: str,
    slices: str,
    batch: int,
    tokens: int | None,
    adapters: int,
    rank: int,
    width: int,
    rows: int,
    seed: int,
) -> None:
    sizes = {"adapters": adapters, "rank": rank, "width": 4 * width, "rows": 4 * rows}
    check(
        make(
            kind,
            slices=slices,
            batch=batch,
            tokens=tokens,
            seed=seed,
            dtype=torch.float32,
            **sizes,
        )
    )


def told(case: Case, mixture: Mixture, x: Tensor | None = None) -> set[str]:
    ran: set[str] = set()
    with torch.no_grad(), told_kernels(ran):
        mixture.add_to(case.y.clone(), case.x if x is None else x, MODULE)
    return ran


def test_what_does_not_fit_is_computed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = {"adapters": 4, "rank": 2, "width": 8, "rows": 4, "dtype": torch.float32}

    def ran(mix: str = "delta", **changed: object) -> set[str]:
        case = make("picked", mix, **{**fitting, **changed})
        return told(case, case.mixture(block_of(case)[1], case.coefficients))

    assert ran() == {"grouped_mm"}
    assert ran(dtype=torch.float64) == {"gathered"}
    assert ran(width=6) == {"gathered"}
    assert ran(rows=6) == {"gathered"}
    assert ran(mix="params") == {"gathered"}
    monkeypatch.setattr(grouped_mm, "MOST", 3)
    assert ran() == {"gathered"}
    assert ran(adapters=3) == {"grouped_mm"}


def test_other_adapters_are_not_touched_and_windows_are_sorted_anew() -> None:
    case = make("picked", adapters=6, batch=2, rank=2, width=4, rows=4, dtype=torch.float32)
    case.flat[[0, 2, 4]] = torch.nan
    picks = Picks(torch.tensor([[1, 3], [5, 1]]), torch.tensor([1, 3, 5]))
    mixture = Mixture.weighted(block_of(case)[1], case.coefficients, "delta", picks)
    with torch.no_grad():
        whole = mixture.add_to(case.y.clone(), case.x, MODULE)
        assert whole.isfinite().all()
        # Each sample's tokens as two windows of half of them.
        halves = case.x.unflatten(1, (2, -1)).flatten(0, 1)
        into = case.y.unflatten(1, (2, -1)).flatten(0, 1).clone()
        apart = mixture.over(len(halves), MODULE).add_to(into, halves, MODULE)
    torch.testing.assert_close(apart.view_as(whole), whole)


def test_few_rows_of_large_adapters_that_many_samples_share_are_grouped_by_count() -> None:
    def grouped(
        batch: int, tokens: int, used: int, rank: int = 64, dtype: torch.dtype = torch.bfloat16
    ) -> bool:
        width = 4096
        values = ModuleValues(
            sites_of("", width, width),
            torch.empty(300, 1, rank, width, dtype=dtype, device="meta"),
            (torch.empty(300, rank, width, dtype=dtype, device="meta"),),
        )
        x = torch.empty(batch, tokens, width, dtype=torch.bfloat16, device="meta")
        index = torch.empty(batch, 4, dtype=torch.int64, device="meta")
        picks = Picks(index, torch.empty(used, dtype=torch.int64, device="meta"))
        return mixing._in_groups(x, values, picks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "costs", COSTS)
        assert grouped(256, 1, 200)
        assert not grouped(256, 1, 20)  # all for all is less
        assert not grouped(8, 1, 32)  # so little that what starts more kernels is slower
        assert not grouped(256, 197, 200)  # copies of the rows are more than those of adapters
        assert not grouped(256, 1, 200, dtype=torch.float32)  # the adapters would be copied


@given(adapters=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_pairs_are_sorted_by_adapter(adapters: list[int]) -> None:
    pairs = Sorted.of(torch.tensor(adapters), 7)
    assert pairs.order.tolist() == sorted(range(len(adapters)), key=lambda pair: adapters[pair])
    assert pairs.order[pairs.back].tolist() == list(range(len(adapters)))
    assert pairs.ends.tolist() == [sum(one <= last for one in adapters) for last in range(7)]


def test_nothing_waits_for_a_device() -> None:
    layout = Layout(sites_of("qv", 16, 8), 3)  # a rank that is padded
    flat = torch.zeros(5, layout.numel, dtype=torch.bfloat16)
    with FakeDevice("cuda") as device, torch.no_grad():
        values = device.take(AdapterValues.from_flat(flat, layout, 1.0))
        block = values.block(0)
        assert block is not None
        index, x, y = (
            tensor.to(device.device)
            for tensor in (
                torch.zeros(4, 2, dtype=torch.int64),
                torch.zeros(4, 3, 16, dtype=torch.bfloat16),
                torch.zeros(4, 3, 24, dtype=torch.bfloat16),
            )
        )
        device.waits.clear()
        ran: set[str] = set()
        for mixture in (
            Mixture.chosen(block, index[:, 0]),
            Mixture.weighted(block, index.bfloat16(), "delta", Picks(index)),
        ):
            with told_kernels(ran):
                assert mixture.add_to(y, x, MODULE).shape == y.shape
        assert ran == {"grouped_mm"}
        assert device.waits == {}
        assert device.doubles == {}


def test_a_pass_with_groups_is_one_graph() -> None:
    case = make("chosen", adapters=3, rank=2, width=8, rows=8, dtype=torch.bfloat16)
    _, block = block_of(case)

    def added(index: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return Mixture.chosen(block, index).add_to(y, x, MODULE)

    given = (case.index, case.x, case.y)
    torch._dynamo.reset()
    compiled = torch.compile(added, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), added(*given))


def test_only_a_gpu_with_such_a_kernel_multiplies_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    half, gpu = torch.bfloat16, torch.device("cuda", 0)
    capability = [9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability[0], 0))
    monkeypatch.setattr(torch.version, "hip", None)

    def multiplies(dtype: torch.dtype = half, device: torch.device = gpu) -> bool:
        devices._has_grouped_kernel.cache_clear()
        return devices.multiplies_groups(dtype, device)

    try:
        assert multiplies()
        assert not multiplies(torch.float32)
        assert not multiplies(device=torch.device("cpu"))
        capability[0] = 8
        assert not multiplies()
    finally:
        devices._has_grouped_kernel.cache_clear()
