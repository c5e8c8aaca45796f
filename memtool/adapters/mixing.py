"""The one computation: y = W x + b + B (g ⊙ (A x)), for every way of choosing the gate g.

x is (b, n, d), y the frozen output W x + b. A and B of t adapters of rank r are read as R = t · r
rank-1 pieces; the gate says how much each counts for each sample or token:

    whole      one adapter for all                      g = s
    grouped    group i of the batch uses adapter i      g = s_i
    delta      ΔW = Σ_t a_t s_t B_t A_t                 g = a_t s_t
    ranks      ΔW = Σ_t s_t B_t diag(a_t) A_t           g = a_tk s_t: every rank has its own
    params     ΔW = (Σ_t a_t s_t B_t)(Σ_t a_t A_t)      rank r again after mixing
    atoms      every token chooses rank-1 atoms         g = w s, k-sparse; see `atoms.py`

with s_t the scaling (alpha / r) of adapter t and a_t its coefficient. The two mixtures agree for
one-hot coefficients only: a negative coefficient subtracts under delta, while under params −1
gives +BA. Where few a_t of a sample are not zero, they are told by index and the others are never
touched; a hard choice is one of them, of 1.

All of it is two functions with a gate between: `project` (z = A x) and `lift` (y + B z). Factors
that the batch shares make them two plain matrix products, factors of every sample two batched
ones. Which is cheaper follows from shapes alone and is decided here, by `costs`. Everything runs
in the dtype of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from memtool.adapters import grouped_mm
from memtool.adapters.atoms import AtomGate, BlockAtoms, ModuleAtoms, add_atoms
from memtool.adapters.convolution import Patches, Window
from memtool.adapters.layout import Site
from memtool.adapters.picks import Picks
from memtool.adapters.values import BlockValues, ModuleValues
from memtool.devices import at_hand, without_autocast
from memtool.errors import MismatchError, did_you_mean

Mix = Literal["delta", "params"]

_TOLD: ContextVar[set[str] | None] = ContextVar("_TOLD", default=None)


@contextmanager
def told_kernels(into: set[str]) -> Iterator[None]:
    """Inside, the kernels that compute adapters which are picked are added: names of `Costs`.

    A pass that torch.compile made tells nothing.
    """
    token = _TOLD.set(into)
    try:
        yield
    finally:
        _TOLD.reset(token)


def _tell(kernel: str) -> None:
    if not torch.compiler.is_compiling() and (into := _TOLD.get()) is not None:
        into.add(kernel)


def project(x: Tensor | Patches, a: Tensor) -> Tensor:
    """The rank products z = A x (b, n, sites, R) of x (b, n, d), for all sites at once.

    `a` is (sites, R, d), shared by the batch, or (b, sites, R, d), one for every sample.
    """
    rows = a.flatten(-3, -2)
    if isinstance(x, Patches):
        return x.project(rows).unflatten(-1, a.shape[-3:-1])
    # With few rows of its own, a sample's product runs up to twice as fast transposed.
    z = F.linear(x, rows) if rows.ndim == 2 else torch.bmm(rows, x.transpose(1, 2)).transpose(1, 2)
    return z.unflatten(-1, a.shape[-3:-1])


def lift(y: Tensor, z: Tensor, b: Sequence[Tensor], sites: Sequence[Site]) -> Tensor:
    """The sum y + B z on the rows of every site, of y (b, n, rows) and z (b, n, sites, R).

    `b` holds for every site (R, rows of the site), shared by the batch, or (b, R, rows of the
    site). `sites` ascend by row, y is contiguous. Without gradients the sum goes into y itself;
    with gradients y is left as it is.
    """
    if not torch.is_grad_enabled():
        tokens = y.view(-1, y.shape[-1])
        for index, site in enumerate(sites):
            if b[index].ndim == 2:
                rows = tokens.narrow(-1, site.first_row, site.out_features)
                rows.addmm_(z[:, :, index].flatten(0, 1), b[index])
            else:
                rows = y.narrow(-1, site.first_row, site.out_features)
                rows.baddbmm_(z[:, :, index], b[index])
        return y

    reduced = z.unbind(2)

    def lifted(index: int, rows: Tensor) -> Tensor:
        if b[index].ndim == 2:
            flat = torch.addmm(rows.flatten(0, 1), reduced[index].flatten(0, 1), b[index])
            return flat.view(rows.shape)
        return torch.baddbmm(rows, reduced[index], b[index])

    return _changed(y, sites, lifted)


def _changed(y: Tensor, sites: Sequence[Site], change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A new y whose rows of site i are `change(i, rows)`.

    One split and one concatenation: for a slice written in place, autograd would copy the whole
    gradient of y, once for every slice.
    """
    sizes: list[int] = []
    adapted: list[int] = []
    end = 0
    for site in sites:
        if site.first_row > end:
            sizes.append(site.first_row - end)
        adapted.append(len(sizes))
        sizes.append(site.out_features)
        end = site.first_row + site.out_features
    if end < y.shape[-1]:
        sizes.append(y.shape[-1] - end)
    parts = list(y.split(sizes, dim=-1))
    for index, part in enumerate(adapted):
        parts[part] = change(index, parts[part])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def spread(coefficients: Tensor, rank: int) -> Tensor:
    """Coefficients (..., t) to gates (..., t · rank): every rank gets that of its adapter.

    With gradients a product with a 0/1 matrix, which is exact, and much faster backward than
    repeating single numbers over rows as short as a rank.
    """
    if not torch.is_grad_enabled():
        return coefficients.repeat_interleave(rank, dim=-1)
    owner = torch.eye(coefficients.shape[-1], dtype=coefficients.dtype, device=coefficients.device)
    return coefficients @ owner.repeat_interleave(rank, dim=1)


MOVE = 16
"""Multiply-adds that a number moved counts on a CPU."""

MOVE_ON_GPU = 128
"""The same where groups are multiplied by one kernel: an H100 or later."""

LAUNCHES = 2**25
"""Numbers that such a GPU moves while the few more kernels of `grouped_mm` start."""


class Costs(NamedTuple):
    """What each kernel costs for one module, in multiply-adds; see `costs`."""

    dense: float
    formed: float
    mixed: float
    folded: float
    gathered: float
    blended: float
    grouped_mm: float


def costs(
    x: Tensor | Patches,
    values: ModuleValues,
    adapters: int | None = None,
    each: int = 1,
    move: int = MOVE,
) -> Costs:
    """Arithmetic plus memory traffic of each kernel for x (b, n, d), with N = b n tokens.

    dense     project to all R ranks, gate, lift: N R (d_in + d_out)
    formed    ΔW of every sample, then N d_in d_out; for R beyond the width and many tokens
    mixed     A and B of every sample mixed first, then rank r: (b R + N r)(d_in + d_out)
    folded    params without forming factors: dense, with a sum over adapters between
    gathered  A and B of the `each` adapters of every sample copied, then rank r · each
    blended   params of those copies: mixed for every sample, then rank r
    grouped_mm  x copied for each of the `each` adapters, what they add written and read; on a GPU
              with `LAUNCHES`

    R is of so many `adapters`, None: of all. Numbers moved beyond x and y count `move`
    multiply-adds each: about 10 is the ratio on a CPU core in its caches, 100 and more on a GPU.
    The choices depend on it weakly.
    """
    count, sites, rank, width = values.a.shape
    batch, tokens_each, _ = x.shape
    tokens, total = batch * tokens_each, (count if adapters is None else adapters) * rank
    rows = sum([factor.shape[-1] for factor in values.b])
    per_rank = sites * width + rows
    product, copy = tokens * rank * per_rank, move * 3 * batch * rank * per_rank
    dense = tokens * total * per_rank + move * (4 * tokens * sites * total + total * per_rank)
    return Costs(
        dense=dense,
        formed=(batch * total + tokens) * width * rows + move * batch * rows * (total + 3 * width),
        mixed=product + copy + batch * total * per_rank + move * total * per_rank,
        folded=dense + move * 2 * tokens * sites * total,
        gathered=each * (product + copy),
        blended=product + each * copy,
        grouped_mm=each * product
        + move * (each * tokens * (3 * width + 4 * sites * rank + 4 * rows) + total * per_rank)
        + move * LAUNCHES,
    )


def _shared(values: ModuleValues) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A (sites, R, d) and B (R, rows) of all adapters at once; views, but for A of many sites."""
    return values.a.transpose(0, 1).flatten(1, 2), tuple(
        factor.flatten(0, 1) for factor in values.b
    )


def add_whole(y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor) -> Tensor:
    """Add s B A x to y, with one adapter for all samples; scaling (1,)."""
    a, b = _shared(values)
    return lift(y, project(x, a) * scaling.to(y.dtype), b, values.sites)


def add_grouped(y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor) -> Tensor:
    """Add s_i B_i A_i x to group i of t equal contiguous groups of the batch; scaling (t,)."""
    groups = (len(scaling), x.shape[0] // len(scaling) * x.shape[1])
    if isinstance(x, Patches):
        z = project(x, values.a).reshape(*groups, *values.a.shape[1:3])
    else:
        z = project(x.reshape(*groups, x.shape[-1]), values.a)
    z = z * scaling.to(y.dtype).view(-1, 1, 1, 1)
    return lift(y.view(*groups, y.shape[-1]), z, values.b, values.sites).view(y.shape)


def add_delta(
    y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor, coefficients: Tensor
) -> Tensor:
    """Add Σ_t a_t s_t B_t A_t x to y; coefficients (b, 1, t), or (b, n, t) for every token."""
    return _add_gated(y, x, values, _spread_over(values, coefficients * scaling, y.dtype))


def add_ranks(
    y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor, each: Tensor
) -> Tensor:
    """Add Σ_t s_t B_t diag(a_t) A_t x to y; `each` (b, t, r) is a: one for every rank."""
    gate = (each * scaling.unsqueeze(-1)).flatten(1).unsqueeze(1)
    return _add_gated(y, x, values, gate.to(y.dtype))


def _spread_over(values: ModuleValues, scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate (b, 1 or n, R) of scaled coefficients (b, 1 or n, t)."""
    return spread(scaled.to(dtype), values.a.shape[2])


def _add_gated(y: Tensor, x: Tensor | Patches, values: ModuleValues, gate: Tensor) -> Tensor:
    """Add B (g ⊙ A x) of all ranks to y by the cheaper kernel; gate (b, 1, R) or (b, n, R)."""
    cost = costs(x, values)
    if gate.shape[1] < x.shape[1] and cost.formed < cost.dense:
        return _add_formed(y, x, values, gate)
    return _add_dense(y, x, values, gate)


def _add_dense(y: Tensor, x: Tensor | Patches, values: ModuleValues, gate: Tensor) -> Tensor:
    a, b = _shared(values)
    return lift(y, project(x, a) * gate.unsqueeze(2), b, values.sites)


def _add_formed(y: Tensor, x: Tensor | Patches, values: ModuleValues, gate: Tensor) -> Tensor:
    a, b = _shared(values)
    gate = gate.transpose(1, 2)
    # ΔW transposed of every sample takes the place of B, and x that of z.
    x = x.tokens() if isinstance(x, Patches) else x
    delta = tuple(a[i].t() @ (gate * factor) for i, factor in enumerate(b))
    z = x.unsqueeze(2).expand(-1, -1, len(b), -1)
    return lift(y, z, delta, values.sites)


def _mix(coefficients: Tensor, factors: Tensor) -> Tensor:
    """Σ_t a_t F_t (b, ...) of coefficients (b, 1, t) and factors (t, ...): one product."""
    return (coefficients[:, 0] @ factors.flatten(1)).unflatten(1, factors.shape[1:])


def add_params(
    y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor, coefficients: Tensor
) -> Tensor:
    """Add (Σ_t a_t s_t B_t)(Σ_t a_t A_t) x to y; coefficients as in `add_delta`."""
    adapters, _, rank, _ = values.a.shape
    plain, scaled = coefficients.to(y.dtype), (coefficients * scaling).to(y.dtype)
    cost = costs(x, values)
    if plain.shape[1] < x.shape[1] and cost.mixed < cost.folded:
        a = _mix(plain, values.a)
        b = tuple(_mix(scaled, factor) for factor in values.b)
        return lift(y, project(x, a), b, values.sites)
    # Σ_t a_t A_t x sums A_t x over the adapters, and (Σ_t a_t s_t B_t) z spreads z over them.
    a, b = _shared(values)
    fold = torch.eye(rank, dtype=y.dtype, device=y.device).repeat(adapters, 1)
    z = project(x, a) * spread(plain, rank).unsqueeze(2)
    z = (z @ fold) @ fold.t() * spread(scaled, rank).unsqueeze(2)
    return lift(y, z, b, values.sites)


def add_picked(
    y: Tensor,
    x: Tensor | Patches,
    values: ModuleValues,
    scaling: Tensor,
    weights: Tensor,
    picks: Picks,
    mix: Mix,
) -> Tensor:
    """As `add_delta` or `add_params`, with the coefficients `weights` (b, k) of few adapters each.

    The factors are gathered for every sample, or once for all that the batch uses, whichever is
    cheaper; `values` of other adapters are neither cast nor copied. `values` are as they are
    stored. Where a device multiplies groups of rows in one kernel, that may be cheaper than both.
    """
    if mix == "delta" and isinstance(x, Tensor) and _in_groups(x, values, picks):
        _tell("grouped_mm")
        return add_grouped_mm(y, x, values, scaling, weights, picks)
    used, count = picks.used, len(scaling) if picks.used is None else len(picks.used)
    cost = costs(x, values, count, picks.index.shape[1])
    together, apart = min(cost.dense, cost.formed), cost.gathered
    if mix == "params":
        together, apart = min(cost.mixed, cost.folded), cost.blended
    _tell("dense" if together < apart else "gathered")
    if together < apart:
        here = values.of(used, y.dtype)
        scaling = scaling if used is None else scaling.index_select(0, used)
        add = add_delta if mix == "delta" else add_params
        return add(y, x, here, scaling, picks.spread(weights, count).unsqueeze(1))
    batch, each = picks.index.shape
    flat = picks.index.flatten()
    own = values.of(flat, y.dtype)
    scaled = (weights * scaling.index_select(0, flat).view(batch, each)).to(y.dtype)
    if mix == "params":
        plain = weights.to(y.dtype)
        a = _mix_own(plain, own.a)
        b = tuple(_mix_own(scaled, factor) for factor in own.b)
        return lift(y, project(x, a), b, values.sites)
    # The ranks of one adapter after those of another, in B as they lie.
    z = project(x, own.a.flatten(1, 2).unflatten(0, (batch, each))) * scaled[:, None, :, None]
    z = z.unflatten(-1, own.a.shape[1:3]).transpose(2, 3).flatten(3)
    b = tuple(factor.unflatten(0, (batch, each)).flatten(1, 2) for factor in own.b)
    return lift(y, z, b, values.sites)


def add_grouped_mm(
    y: Tensor, x: Tensor, values: ModuleValues, scaling: Tensor, weights: Tensor, picks: Picks
) -> Tensor:
    """As `add_picked` with mix delta, by one product of groups of rows; see `grouped_mm`."""
    used = _taking_part(values, picks, x.dtype)
    gate = (weights * scaling[picks.index]).to(y.dtype)
    pairs = picks.sorted(len(scaling) if used is None else len(used))
    found = grouped_mm.contributions(x, values.of(used, y.dtype), gate, pairs)
    if torch.is_grad_enabled():
        parts = list(found)
        return _changed(y, values.sites, lambda index, rows: rows + parts[index])
    for site, part in zip(values.sites, found, strict=True):
        y.narrow(-1, site.first_row, site.out_features).add_(part)
    return y


def _taking_part(values: ModuleValues, picks: Picks, dtype: torch.dtype) -> Tensor | None:
    """The adapters that are copied for groups of rows; None: the stack takes part as it lies."""
    return None if _lies_ready(values, dtype) and len(values.a) <= grouped_mm.MOST else picks.used


def _lies_ready(values: ModuleValues, dtype: torch.dtype) -> bool:
    """Whether groups of rows are multiplied with values as they are stored."""
    return values.a.dtype == dtype and not grouped_mm.padding(values.a.shape[2], dtype)


def _in_groups(x: Tensor, values: ModuleValues, picks: Picks) -> bool:
    """Whether a product of groups of rows is what costs least."""
    count = len(values.a)
    used = _taking_part(values, picks, x.dtype)
    if not grouped_mm.fits(x, values, count if used is None else len(used)):
        return False
    read = count if picks.used is None else len(picks.used)
    cost = costs(x, values, read, picks.index.shape[1], MOVE_ON_GPU)
    copied = 0
    if used is not None or not _lies_ready(values, x.dtype):
        copied = 2 * MOVE_ON_GPU * read * sum(f[0].numel() for f in (values.a, *values.b))
    return cost.grouped_mm + copied < min(cost.dense, cost.formed, cost.gathered)


def _mix_own(weights: Tensor, factors: Tensor) -> Tensor:
    """Σ_k w_ik F_ik (b, ...) of weights (b, k) and factors (b · k, ...) of every sample."""
    flat = factors.flatten(1).unflatten(0, weights.shape)
    return torch.bmm(weights.unsqueeze(1), flat)[:, 0].unflatten(1, factors.shape[1:])


def _over(gate: Tensor, rows: int, module: str) -> Tensor:
    """A gate (b, ...) for a batch of whole samples folded into windows (rows)."""
    windows, rest = divmod(rows, len(gate))
    if rest:
        raise MismatchError(
            f"{module}: a batch of {rows} for coefficients of {len(gate)} samples",
            expected="equally many windows of every sample",
        )
    return gate if windows == 1 else gate.repeat_interleave(windows, dim=0)


def _check_index(index: Tensor, count: int) -> None:
    """Raise MismatchError for adapters that are none of so many."""
    # Where it is not at hand the lookup itself checks.
    if at_hand(index) and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= count:
            raise MismatchError(f"choice of adapters {low} to {high}", expected=f"0 to {count - 1}")


@dataclass(frozen=True, eq=False)
class Mixture:
    """How one block's adapters act on one batch: made per forward pass and block.

    Use the constructors `whole`, `grouped`, `weighted`, `ranked`, `chosen` and `atoms`, which check
    the shapes. An adapted layer calls `add_to`. With `picks` a gate (b, k) is of these adapters
    alone. `ready` holds what was made of a gate (b, t) that does not learn, by rank and dtype.

        mixture = Mixture.weighted(values.block(3), coefficients, mix="params")
        y = mixture.add_to(F.linear(x, weight, bias), x, "blocks.3.attn.qkv")
    """

    values: BlockValues | BlockAtoms
    kind: Literal["whole", "grouped", "delta", "params", "ranks", "atoms"]
    gate: Tensor | None = None
    picks: Picks | None = None
    ready: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def whole(cls, values: BlockValues) -> Mixture:
        """The one adapter for every sample: LoRA training, or a fixed adapter."""
        if len(values) != 1:
            raise MismatchError(
                f"{len(values)} adapters for all samples alike",
                expected="one adapter",
                remedy="grouped, weighted or chosen for several",
            )
        return cls(values, "whole")

    @classmethod
    def grouped(cls, values: BlockValues) -> Mixture:
        """The batch is t equal contiguous groups; group i uses adapter i.

        The several adapters of a task train in one pass this way.
        """
        return cls(values, "grouped")

    @classmethod
    def chosen(cls, values: BlockValues, index: Tensor) -> Mixture:
        """Sample i uses adapter index[i]: exact recall and hard choice; index (b,) int64."""
        if index.ndim != 1 or index.dtype != torch.int64:
            raise MismatchError(
                f"choice of shape {tuple(index.shape)} and type {index.dtype}",
                expected="(batch,) int64",
            )
        _check_index(index, len(values))
        ones = values.scaling.new_ones(index.shape[0], 1)  # a length is a constant to torch.export
        return cls(values, "delta", ones, Picks(index.unsqueeze(1)))

    @classmethod
    def weighted(
        cls,
        values: BlockValues,
        coefficients: Tensor,
        mix: Mix = "delta",
        picks: Picks | None = None,
    ) -> Mixture:
        """Adapters weighted by coefficients (b, t), or (b, n, t) with one set for every token.

        With `picks` coefficients (b, k) are those of the adapters that each sample uses.
        """
        if mix not in get_args(Mix):
            raise MismatchError(f"mix {mix!r}", remedy=did_you_mean(mix, get_args(Mix)))
        if picks is not None:
            if coefficients.shape != picks.index.shape:
                raise MismatchError(
                    f"coefficients of shape {tuple(coefficients.shape)}",
                    expected=f"{tuple(picks.index.shape)}: one for each adapter that is picked",
                )
            _check_index(picks.index, len(values))
            return cls(values, mix, coefficients, picks)
        if coefficients.ndim not in (2, 3) or coefficients.shape[-1] != len(values):
            raise MismatchError(
                f"coefficients of shape {tuple(coefficients.shape)}",
                expected=f"(batch, {len(values)}) or (batch, tokens, {len(values)})",
            )
        return cls(values, mix, coefficients)

    @classmethod
    def ranked(cls, values: BlockValues, each: Tensor) -> Mixture:
        """Every rank of every adapter weighted by its own number: `each` (b, t, r), mix delta."""
        shape = (len(values), next(iter(values.modules.values())).a.shape[2])
        if each.ndim != 3 or tuple(each.shape[1:]) != shape:
            raise MismatchError(
                f"weights of ranks of shape {tuple(each.shape)}",
                expected=f"(batch, {shape[0]}, {shape[1]})",
            )
        return cls(values, "ranks", each)

    @classmethod
    def atoms(
        cls, modules: Mapping[str, ModuleAtoms], gate: AtomGate, *, training: bool = False
    ) -> Mixture:
        """Every token chooses atoms of its module; the threshold is off while `training`."""
        return cls(BlockAtoms(modules, gate, training), "atoms")

    def in_block(self, values: BlockValues) -> Mixture:
        """The same coefficients for another block of the same stack of adapters."""
        return Mixture(values, self.kind, self.gate, self.picks, self.ready)

    def add_to(self, y: Tensor, x: Tensor, module: str) -> Tensor:
        """The frozen output y of a module plus the adapters' contribution, for its input x.

        x (b, *tokens, d_in), y (b, *tokens, rows of the module), any number of token dimensions
        or none. Rows without a site, and modules without any, stay as they are. When gradients
        are off, y may be overwritten. Raises MismatchError when the shapes do not fit.
        """
        block = self.values
        found = block.modules.get(module)
        if found is None:
            return y
        tokens = self._check(y, x, found.sites[0], module)
        inputs = x.to(y.dtype).reshape(x.shape[0], tokens, x.shape[-1])
        outputs = y.contiguous().view(x.shape[0], tokens, y.shape[-1])
        with without_autocast(x):
            if isinstance(block, BlockAtoms):
                atoms = block.modules[module].to(y.dtype)
                added = add_atoms(outputs, inputs, atoms, block.gate, training=block.training)
            else:
                added = self._add_adapters(outputs, inputs, block.modules[module], block.scaling)
        return added.view(y.shape)

    def add_to_map(self, y: Tensor, x: Tensor, module: str, window: Window) -> Tensor:
        """As `add_to`, of a convolution: y (b, rows, h', w') for its input x (b, channels, h, w).

        A coefficient for every token is one for every place of the output. Raises MismatchError
        when the shapes do not fit, and for atoms.
        """
        block = self.values
        if module not in block.modules:
            return y
        if isinstance(block, BlockAtoms):
            raise MismatchError(
                f"atoms at {module}, which is a convolution",
                expected="atoms at linear layers",
                remedy="method mira or modulation, whose adapters a convolution takes",
            )
        if window.is_a_place:
            rows, columns = window.stride
            places = x[:, :, ::rows, ::columns].movedim(1, -1)
            return self.add_to(y.movedim(1, -1), places, module).movedim(-1, 1)
        patches = Patches(x, window).to(y)
        found = block.modules[module]
        site = found.sites[0]
        if (patches.shape, y.ndim) != ((y.shape[0], math.prod(y.shape[2:]), site.in_features), 4):
            raise MismatchError(
                f"{module}: input {tuple(x.shape)} and output {tuple(y.shape)}",
                expected=f"(batch, {site.channels}, ...) and (batch, {site.module_rows}, ...)",
            )
        last = y.movedim(1, -1)
        outputs = last.contiguous().view(*patches.shape[:2], y.shape[1])
        self._check(outputs, patches, site, module)
        with without_autocast(x):
            added = self._add_adapters(outputs, patches, found, block.scaling)
        return added.view(last.shape).movedim(-1, 1)

    def over(self, rows: int, module: str) -> Mixture:
        """The mixture of a layer whose batch has `rows`: windows of samples, one after another.

        Raises MismatchError for rows that are not equally many of every sample.
        """
        if self.gate is None or rows == len(self.gate):
            return self
        picks = self.picks
        if picks is not None:
            picks = replace(picks, index=_over(picks.index, rows, module), ready={})
        return replace(self, gate=_over(self.gate, rows, module), picks=picks, ready={})

    def dense(self) -> Mixture:
        """The same, with a coefficient for all adapters that the batch uses, and no other."""
        picks, block = self.picks, self.values
        if picks is None or self.gate is None or isinstance(block, BlockAtoms):
            return self
        if picks.used is not None:
            block = block.of(picks.used)
        gate = picks.spread(self.gate, len(block))
        return replace(self, values=block, gate=gate, picks=None, ready={})

    def _add_adapters(
        self, y: Tensor, x: Tensor | Patches, values: ModuleValues, scaling: Tensor
    ) -> Tensor:
        gate = self.gate
        if self.picks is not None and gate is not None:
            mix: Mix = "params" if self.kind == "params" else "delta"
            return add_picked(y, x, values, scaling, gate, self.picks, mix)
        values = values.of(None, y.dtype)
        if gate is None:
            add = add_whole if self.kind == "whole" else add_grouped
            return add(y, x, values, scaling)
        if self.kind == "ranks":
            return add_ranks(y, x, values, scaling, gate)
        # What learns is spread anew: a block that is computed again for backward does the same.
        learns = gate.requires_grad and torch.is_grad_enabled()
        if self.kind == "delta" and gate.ndim == 2 and not learns:
            kind = (values.a.shape[2], y.dtype)
            if kind not in self.ready:
                self.ready[kind] = _spread_over(values, gate.unsqueeze(1) * scaling, y.dtype)
            return _add_gated(y, x, values, self.ready[kind])
        add_mixed = add_delta if self.kind == "delta" else add_params
        return add_mixed(y, x, values, scaling, gate.unsqueeze(1) if gate.ndim == 2 else gate)

    def _check(self, y: Tensor, x: Tensor | Patches, site: Site, module: str) -> int:
        # Returns the number of tokens of each sample.
        if len(x.shape) < 2 or (*x.shape[:-1], site.module_rows) != y.shape:
            raise MismatchError(
                f"{module}: input {tuple(x.shape)} and output {tuple(y.shape)}",
                expected=f"(batch, ..., {site.in_features}) and (batch, ..., {site.module_rows})",
            )
        if x.shape[-1] != site.in_features:
            raise MismatchError(
                f"{module}: input {tuple(x.shape)}", expected=f"(batch, ..., {site.in_features})"
            )
        batch, tokens = x.shape[0], math.prod(x.shape[1:-1])
        groups = 1
        if self.kind == "grouped" and isinstance(self.values, BlockValues):
            groups = len(self.values)
        if batch % groups:
            raise MismatchError(
                f"{module}: a batch of {batch} in {groups} groups", expected="groups of equal size"
            )
        gate = self.gate
        if gate is not None and (
            gate.shape[0] != batch
            or (gate.ndim == 3 and self.kind != "ranks" and gate.shape[1] != tokens)
        ):
            raise MismatchError(
                f"{module}: {tuple(gate.shape)} coefficients or choices for a batch of "
                f"{batch} with {tokens} tokens each",
                expected="the batch of the input, and its tokens where every token has its own",
            )
        return tokens
