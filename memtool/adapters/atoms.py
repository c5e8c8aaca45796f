"""The gate of MoRAM: rank-1 atoms that every token chooses by its own response to their keys.

A bank has n atoms, each a key A_i (d_in) and a value B_i (d_out) with a scaling s_i. For a token x

    z = A x                                       response of every atom
    score = z / max(|z|, 1e-12)                   norm over the bank, or over the atoms of each task
    w = softmax(score / temperature)              over the k largest scores, 0 elsewhere
    w = w · [score ≥ threshold]                   in evaluation only, not renormalised
    y = W x + b + Σ_i w_i s_i z_i B_i

Scores and softmax are float32 at least, products run in the dtype of y. All n responses are needed
for the norm, but only k of them after it: values are read where they are kept, and backward stores
k numbers for every token, not n, and computes the others again.

The norm reaches every atom, so the exact gradient does, too: with c = dL/d|z| every response, kept
or not, gets c z_i / |z|. `selected_only` takes the responses that were not kept for constants.

Under scores "bf16" nothing is exact but the k responses: without gradients all z are computed in
bfloat16, their norm with them, and those of `CANDIDATES` k atoms again exactly. A token may keep
other atoms than it should only where more than these are as near as that format tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memtool.adapters.layout import Site
from memtool.devices import at_hand
from memtool.errors import ConfigError, MismatchError, did_you_mean

ScoreNorm = Literal["bank", "task"]
Scores = Literal["exact", "bf16"]

EPSILON = 1e-12
"""The least norm that responses are divided by."""

FLUSH = 1e-30
"""Weights below become zero: numbers too small for a normal float slow a processor down."""

IN_CACHE = 2**18
"""Numbers that a step on a CPU works on at once, so that what it makes stays in the cache."""

RESPONSES = 2**22
"""Responses that a CPU computes at once: memory that it has, instead of new pages every time."""

CANDIDATES = 2
"""Times as many atoms as are kept are scored exactly after all were in bfloat16."""

WORTH = 16
"""Times as many atoms as are kept, from which on scores in bfloat16 are less work."""

SUM = 0
"""The mode "sum" of torch's embedding bag, by number."""

FEW_THREADS = 3
"""On a CPU numpy chooses three times as fast as torch, but in one thread."""

MANY = 64
"""Times as many scores as are kept, from which on a CPU chooses among groups of them first."""


@dataclass(frozen=True)
class AtomGate:
    """How tokens choose among atoms.

    topk             atoms kept for a token, at least 2; a bank with fewer keeps all it has
    temperature      of the softmax over the kept scores
    threshold        score below which a kept atom counts nothing in evaluation; −1 keeps all
    score_norm       "bank": the published norm over all atoms, under which the scores of old
                     atoms shrink as the bank grows; "task": within the atoms of each task
    scaled_threshold with norm "bank" over t tasks, the threshold is divided by √t
    selected_only    no gradient through the responses of atoms that are not kept
    scores           of all atoms without gradients: "exact", or "bf16" where that is less work;
                     with norm "bank" only

    Raises ConfigError for a constant outside its range.
    """

    topk: int = 16
    temperature: float = 0.01
    threshold: float = 0.2
    score_norm: ScoreNorm = "bank"
    scaled_threshold: bool = False
    selected_only: bool = False
    scores: Scores = "exact"

    def __post_init__(self) -> None:
        if self.topk < 2:
            raise ConfigError(
                f"topk of {self.topk} atoms",
                expected="at least 2: the softmax over a single score is always 1",
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature of {self.temperature}", expected="a positive, finite number"
            )
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold of {self.threshold}", expected="a score from -1 to 1")
        if self.score_norm not in get_args(ScoreNorm):
            raise ConfigError(
                f"score norm {self.score_norm!r}",
                remedy=did_you_mean(self.score_norm, get_args(ScoreNorm)),
            )
        if self.scores not in get_args(Scores):
            raise ConfigError(
                f"scores {self.scores!r}", remedy=did_you_mean(self.scores, get_args(Scores))
            )


@dataclass(frozen=True, eq=False)
class Owners:
    """For every atom the place of its owner among a bank's owners, ascending: `tasks` (n,) int64.

    `count` is the number of owners.
    """

    tasks: Tensor
    count: int

    @classmethod
    def of(cls, owner: Tensor) -> Owners:
        """Those of the task of every atom (n,), which are looked at: a device is waited for."""
        found, tasks = owner.unique(return_inverse=True)
        return cls(tasks, len(found))


@dataclass(frozen=True, eq=False)
class AtomBank:
    """The n atoms of one site: `keys` (n, d_in), `values` (n, d_out), the rows A_i and columns B_i.

    `scaling` (n,) is alpha / r of every atom and `owner` (n,) int64 its task. The last `fresh`
    atoms, those of the newest task, get gradients; all before them are constants, whatever
    `requires_grad` says. `owners` are those of `owner` where they are known already. Raises
    MismatchError when the shapes do not fit.
    """

    keys: Tensor
    values: Tensor
    scaling: Tensor
    owner: Tensor
    fresh: int = 0
    owners: Owners | None = None

    def __post_init__(self) -> None:
        count = self.keys.shape[0]
        if (
            (self.keys.ndim, self.values.ndim) != (2, 2)
            or {len(self.values), *self.scaling.shape, *self.owner.shape} != {count}
            or (self.scaling.ndim, self.owner.ndim) != (1, 1)
        ):
            raise MismatchError(
                f"keys {tuple(self.keys.shape)}, values {tuple(self.values.shape)}, scaling "
                f"{tuple(self.scaling.shape)} and owner {tuple(self.owner.shape)} of a bank",
                expected="(n, d_in), (n, d_out), (n,) and (n,)",
            )
        if self.owner.dtype != torch.int64:
            raise MismatchError(f"owners of type {self.owner.dtype}", expected="int64")
        if not 0 <= self.fresh <= count:
            raise MismatchError(f"{self.fresh} fresh atoms", expected=f"0 to {count}, all of them")

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def tasks(self) -> Tensor:
        """For every atom the place of its owner among the bank's owners, ascending; (n,) int64."""
        return self._owners.tasks

    @property
    def task_count(self) -> int:
        """How many tasks own the atoms."""
        return self._owners.count

    @property
    def _owners(self) -> Owners:
        return Owners.of(self.owner) if self.owners is None else self.owners


@dataclass(frozen=True, eq=False)
class ModuleAtoms:
    """The atoms of one linear module: its sites, ascending by `first_row`, and a bank for each.

    The banks may differ in size. `keys` are those of all sites below each other (Σ n, d_in),
    detached: one product scores all. Raises MismatchError when sites and banks do not fit.
    """

    sites: tuple[Site, ...]
    banks: tuple[AtomBank, ...]
    keys: Tensor = field(init=False)
    _casts: dict[torch.dtype, ModuleAtoms] = field(init=False, default_factory=dict)
    _rough: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not self.sites or len(self.sites) != len(self.banks):
            raise MismatchError(
                f"{len(self.banks)} banks for {len(self.sites)} sites",
                expected="one for each, and at least one",
            )
        end = 0
        for site, bank in zip(self.sites, self.banks, strict=True):
            if (bank.keys.shape[1], bank.values.shape[1]) != (site.in_features, site.out_features):
                raise MismatchError(
                    f"{site.name}: atoms that map {bank.keys.shape[1]} to {bank.values.shape[1]}",
                    expected=f"{site.in_features} to {site.out_features}",
                    remedy="a bank made for this backbone",
                )
            if site.first_row < end or site.module_rows != self.sites[0].module_rows:
                raise MismatchError(
                    f"{site.name} begins at row {site.first_row}",
                    expected=f"slices of one module, ascending, this one from row {end} on",
                )
            end = site.first_row + site.out_features
        with torch.no_grad():
            keys = [bank.keys.detach() for bank in self.banks]
            object.__setattr__(self, "keys", keys[0] if len(keys) == 1 else torch.cat(keys))

    def to(self, dtype: torch.dtype) -> ModuleAtoms:
        """The same with keys and values of another dtype; itself where that is the dtype.

        Of frozen atoms it is made once, and kept.
        """
        if all(bank.keys.dtype == bank.values.dtype == dtype for bank in self.banks):
            return self
        if any(bank.fresh for bank in self.banks):
            return self._cast(dtype)
        if dtype not in self._casts:
            self._casts[dtype] = self._cast(dtype)
        return self._casts[dtype]

    def rough_keys(self) -> Tensor:
        """`keys` in bfloat16; of frozen atoms they are made once, and kept."""
        if not self._rough:
            keys = self.keys.bfloat16()
            if any(bank.fresh for bank in self.banks):
                return keys
            self._rough.append(keys)
        return self._rough[0]

    def _cast(self, dtype: torch.dtype) -> ModuleAtoms:
        return ModuleAtoms(
            self.sites,
            tuple(
                replace(bank, keys=bank.keys.to(dtype), values=bank.values.to(dtype))
                for bank in self.banks
            ),
        )


@dataclass(frozen=True, eq=False)
class BlockAtoms:
    """The atoms of one block by module name, their gate, and whether the threshold is off."""

    modules: Mapping[str, ModuleAtoms]
    gate: AtomGate
    training: bool


def add_atoms(
    y: Tensor, x: Tensor, atoms: ModuleAtoms, gate: AtomGate, *, training: bool = False
) -> Tensor:
    """Add Σ_i w_i s_i z_i B_i of every token to y (b, n, rows of the module) for x (b, n, d_in).

    `training` turns the threshold off. Without gradients the sum goes into y, which must be
    contiguous; with gradients y is left as it is. Keys and values have the dtype of y. There is no
    second derivative.
    """
    used = [index for index, bank in enumerate(atoms.banks) if len(bank)]
    if not used or not x.numel():
        return y
    if len(used) < len(atoms.banks):
        atoms = ModuleAtoms(
            tuple(atoms.sites[index] for index in used), tuple(atoms.banks[index] for index in used)
        )
    tokens, inputs = y.flatten(0, 1), x.flatten(0, 1)
    if not torch.is_grad_enabled():
        _add(tokens, atoms, _choose(inputs, atoms, gate), gate, training)
        return y
    fresh = [
        rows[len(rows) - bank.fresh :] for bank in atoms.banks for rows in (bank.keys, bank.values)
    ]
    gate = replace(gate, scores="exact")
    added: Tensor = _AddAtoms.apply(tokens, inputs, atoms, gate, training, *fresh)
    return added.view(y.shape)


def activations(x: Tensor, bank: AtomBank, gate: AtomGate, *, training: bool = False) -> Tensor:
    """The weights w (b, tokens, n) of all atoms of a bank for x (b, tokens, d_in), for inspection.

    Those not kept, or below the threshold, are zero; without gradients, in float32 at least.
    """
    weights = torch.zeros(*x.shape[:-1], len(bank), dtype=_score_dtype(x.dtype), device=x.device)
    if not weights.numel():
        return weights
    width, rows = bank.keys.shape[1], bank.values.shape[1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        atoms = ModuleAtoms((Site(0, "", "", width, rows, 0, rows),), (bank,)).to(x.dtype)
        (choice,) = _choose(x.flatten(0, -2), atoms, gate)
        found = _weights(choice.responses, choice.norms, bank, gate, training)
        weights.view(-1, len(bank)).scatter_(1, choice.index, found)
    return weights


@dataclass(frozen=True)
class _Choice:
    """What tokens keep of one bank: places (N, k), responses (N, k), and what divides these.

    `norms` is (N, 1) for the norm over the bank, (N, k) for that of each atom's task.
    """

    index: Tensor
    responses: Tensor
    norms: Tensor


def _choose(x: Tensor, atoms: ModuleAtoms, gate: AtomGate) -> list[_Choice]:
    """What tokens x (N, d_in) keep at each site."""
    parts = [
        _choose_at_once(x[tokens], atoms, gate) for tokens in _slices(x, len(atoms.keys), RESPONSES)
    ]
    if len(parts) == 1:
        return parts[0]
    return [
        _Choice(
            torch.cat([choice.index for choice in choices]),
            torch.cat([choice.responses for choice in choices]),
            torch.cat([choice.norms for choice in choices]),
        )
        for choices in zip(*parts, strict=True)
    ]


def _choose_at_once(x: Tensor, atoms: ModuleAtoms, gate: AtomGate) -> list[_Choice]:
    """What tokens x (N, d_in) keep at each site. One product responds for all sites."""
    if gate.scores == "bf16" and _is_worth_it(x, atoms, gate):
        responses = F.linear(x.bfloat16(), atoms.rough_keys())
        pairs = zip(atoms.banks, _by_bank(responses, atoms), strict=True)
        return [_choose_again(x, bank, z, gate) for bank, z in pairs]
    dtype = _score_dtype(x.dtype)
    choices: list[_Choice] = []
    for bank, z in zip(atoms.banks, _by_bank(F.linear(x, atoms.keys), atoms), strict=True):
        k = min(gate.topk, len(bank))
        if gate.score_norm == "bank":
            # One positive norm for all: the largest scores are the largest responses.
            norms = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=dtype)
            index = _largest(z, k)
        else:
            members = F.one_hot(bank.tasks, bank.task_count).to(dtype)
            of_tasks = (z.to(dtype).square() @ members).sqrt()
            index = _largest(z / of_tasks.clamp_min(EPSILON).index_select(1, bank.tasks), k)
            norms = of_tasks.gather(1, bank.tasks[index])
        choices.append(_Choice(index, z.gather(1, index).to(dtype), norms))
    return choices


def _is_worth_it(x: Tensor, atoms: ModuleAtoms, gate: AtomGate) -> bool:
    """Whether all scores in bfloat16 and some again are less work than all exactly, and near.

    A norm over the few atoms of a task would be off by as much as their responses.
    """
    wide = x.dtype in (torch.float32, torch.float64) and gate.score_norm == "bank"
    return wide and min(len(bank) for bank in atoms.banks) >= WORTH * gate.topk


def _choose_again(x: Tensor, bank: AtomBank, z: Tensor, gate: AtomGate) -> _Choice:
    """What tokens x (N, d_in) keep of the atoms whose rough responses z (N, n) are highest."""
    dtype, count = _score_dtype(x.dtype), min(CANDIDATES * gate.topk, len(bank))
    highest: list[Tensor] = []
    lengths: list[Tensor] = []
    for tokens in _slices(z, len(bank)):
        wide = z[tokens].to(dtype)
        highest.append(_largest(wide, count))
        lengths.append(torch.linalg.vector_norm(wide, dim=1, keepdim=True))
    index = torch.cat(highest)
    responses = _products(x, index, bank.keys.detach()).to(dtype)
    best = _largest(responses, min(gate.topk, len(bank)))
    return _Choice(index.gather(1, best), responses.gather(1, best), torch.cat(lengths))


def _weights(
    responses: Tensor, norms: Tensor, bank: AtomBank, gate: AtomGate, training: bool
) -> Tensor:
    """The weights w (N, k) of kept atoms."""
    scores = responses / norms.clamp_min(EPSILON)
    weights = F.threshold(torch.softmax(scores / gate.temperature, dim=-1), FLUSH, 0.0)
    if training or gate.threshold == -1:
        return weights
    least = gate.threshold
    if gate.scaled_threshold and gate.score_norm == "bank":
        least /= math.sqrt(bank.task_count)
    return weights * (scores >= least)


def _factors(
    index: Tensor, responses: Tensor, norms: Tensor, bank: AtomBank, gate: AtomGate, training: bool
) -> Tensor:
    """What multiplies the kept values: w s z (N, k)."""
    scaling = bank.scaling.to(responses.dtype).index_select(0, index.flatten())
    weights = _weights(responses, norms, bank, gate, training)
    return weights * responses * scaling.view(index.shape)


def _add(
    y: Tensor, atoms: ModuleAtoms, choices: Sequence[_Choice], gate: AtomGate, training: bool
) -> None:
    """Add the kept atoms of every site to its columns of y (N, rows of the module)."""
    for site, bank, choice in zip(atoms.sites, atoms.banks, choices, strict=True):
        index = choice.index
        factors = _factors(index, choice.responses, choice.norms, bank, gate, training)
        columns = y.narrow(1, site.first_row, site.out_features)
        _add_rows(columns, factors.to(y.dtype), index, bank.values.detach())


class _AddAtoms(torch.autograd.Function):
    """`add_atoms` with gradients. Kept for backward: x, and k-wide places, responses and norms."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        atoms: ModuleAtoms,
        gate: AtomGate,
        training: bool,
        *fresh: Tensor,
    ) -> Tensor:
        del fresh  # the last rows of keys and values, given apart as they alone have gradients
        choices = _choose(x, atoms, gate)
        added = y.clone()
        _add(added, atoms, choices, gate, training)
        ctx.atoms, ctx.gate, ctx.training = atoms, gate, training
        kept: list[Tensor] = []
        for bank, choice in zip(atoms.banks, choices, strict=True):
            place = torch.int16 if len(bank) < 2**15 else torch.int32
            kept += (choice.index.to(place), choice.responses, choice.norms)
        ctx.save_for_backward(x, *kept)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        atoms: ModuleAtoms = ctx.atoms
        x, *kept = ctx.saved_tensors
        pulls: list[_Pull] = []
        of_values: list[Tensor | None] = []
        for place, (site, bank) in enumerate(zip(atoms.sites, atoms.banks, strict=True)):
            index = kept[3 * place].long()
            responses = kept[3 * place + 1].detach().requires_grad_()
            norms = kept[3 * place + 2].detach().requires_grad_()
            columns = of_y.narrow(1, site.first_row, site.out_features)
            with torch.enable_grad():
                factors = _factors(index, responses, norms, bank, ctx.gate, ctx.training)
            of_factors = _products(columns, index, bank.values.detach()).to(factors.dtype)
            of_responses, of_norms = torch.autograd.grad(factors, (responses, norms), of_factors)
            choice = _Choice(index, responses.detach(), norms.detach())
            pulls.append(_pull(choice, of_responses, of_norms, bank, ctx.gate))
            learns = ctx.needs_input_grad[6 + 2 * place]
            used = factors.detach().to(x.dtype)
            dense = _scattered(used, index, len(bank) - bank.fresh, len(bank)) if learns else None
            of_values.append(None if dense is None else dense.t() @ columns)
        of_x, dz = _input_gradient(x, atoms, pulls) if ctx.needs_input_grad[1] else (None, None)
        of_fresh: list[Tensor | None] = []
        for place, (bank, pull) in enumerate(zip(atoms.banks, pulls, strict=True)):
            of_keys = None
            if ctx.needs_input_grad[5 + 2 * place]:
                first = len(bank) - bank.fresh
                fresh = _fresh_responses(x, bank, pull) if dz is None else dz[place][:, first:]
                of_keys = fresh.t() @ x
            of_fresh += (of_keys, of_values[place])
        return (of_y, of_x, None, None, None, *of_fresh)


@dataclass(frozen=True)
class _Pull:
    """dL/dz of one bank: `kept` (N, k) at places `index`, and everywhere `share` times z.

    The norm pulls at all it was taken over: `share` is (N, 1) for the bank, (N, tasks) for the
    tasks, None when only kept atoms get gradients.
    """

    index: Tensor
    kept: Tensor
    share: Tensor | None

    def spread(self, tasks: Tensor) -> Tensor:
        """The share of each of the atoms of these tasks (n,): (N, n), or (N, 1) for one norm."""
        assert self.share is not None
        return self.share if self.share.shape[1] == 1 else self.share.index_select(1, tasks)


def _pull(
    choice: _Choice, of_responses: Tensor, of_norms: Tensor, bank: AtomBank, gate: AtomGate
) -> _Pull:
    # d|z| / dz_i = z_i / |z|
    share = of_norms / choice.norms.clamp_min(EPSILON)
    if gate.score_norm == "task":
        tasks = bank.tasks[choice.index]
        share = share.new_zeros(len(share), bank.task_count).scatter_add(1, tasks, share)
    if not gate.selected_only:
        return _Pull(choice.index, of_responses, share)
    own = share if share.shape[1] == 1 else share.gather(1, bank.tasks[choice.index])
    return _Pull(choice.index, of_responses + own * choice.responses, None)


def _fresh_responses(x: Tensor, bank: AtomBank, pull: _Pull) -> Tensor:
    """dL/dz (N, fresh) of the atoms that learn, whose responses are computed again."""
    first = len(bank) - bank.fresh
    dz = _scattered(pull.kept.to(x.dtype), pull.index, first, len(bank))
    if pull.share is not None:
        z = F.linear(x, bank.keys.detach()[first:])
        dz.addcmul_(z, pull.spread(bank.tasks[first:]).to(x.dtype))
    return dz


def _input_gradient(
    x: Tensor, atoms: ModuleAtoms, pulls: Sequence[_Pull]
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """dL/dx (N, d_in), Σ_i dL/dz_i A_i over the atoms of all sites; with dL/dz if it was formed.

    The norm's part is Σ_i share z_i A_i. Either all z are computed again, 2 N Σn products of rows
    with d_in numbers, or it is share · (x AᵀA), with (N + n) d_in of them for every site; the
    fewer decide. With a norm for every task there are too many AᵀA.
    """
    (tokens, width), total = x.shape, len(atoms.keys)
    again = 2 * tokens * total
    gram = (tokens * len(pulls) + total) * width
    shared = all(pull.share is None or pull.share.shape[1] == 1 for pull in pulls)
    if pulls[0].share is None or (shared and gram < again):
        of_x = torch.zeros_like(x)
        for bank, pull in zip(atoms.banks, pulls, strict=True):
            keys = bank.keys.detach()
            if pull.share is not None:
                of_x += (x @ (keys.t() @ keys)).mul_(pull.share.to(x.dtype))
            _add_rows(of_x, pull.kept.to(x.dtype), pull.index, keys)
        return of_x, None
    z = F.linear(x, atoms.keys)
    banks = _by_bank(z, atoms)
    for bank, dz, pull in zip(atoms.banks, banks, pulls, strict=True):
        dz.mul_(pull.spread(bank.tasks).to(x.dtype))
        dz.scatter_add_(1, pull.index, pull.kept.to(x.dtype))
    return z @ atoms.keys, banks


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_bank(z: Tensor, atoms: ModuleAtoms) -> tuple[Tensor, ...]:
    """The columns (N, n) of each bank in z (N, Σ n); views."""
    return z.split([len(bank) for bank in atoms.banks], dim=1)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Places (N, k) of the k largest of scores (N, n) in every row, in no order."""
    count = scores.shape[1]
    if k == count:
        return torch.arange(count, device=scores.device).expand(scores.shape[0], -1)
    if (
        not at_hand(scores)  # first: what follows is no part of a graph
        or scores.dtype == torch.float64
        or torch.get_num_threads() > FEW_THREADS
    ):
        return scores.topk(k, dim=1, sorted=False).indices
    if count >= MANY * k:
        return _largest_of_groups(scores, k)
    # A shorter float as float64 ends in 29 zero bits at least. With the column written there, one
    # partition of plain numbers, which numpy has vectorised, brings the places along.
    columns = torch.arange(count)
    found: list[Tensor] = []
    for tokens in _slices(scores, 2 * count):  # a float64 is as large as two numbers
        numbered = scores[tokens].double().view(torch.int64)
        numbered |= columns
        numbered.view(torch.float64).numpy().partition(count - k, axis=1)
        found.append(numbered[:, count - k :] & (2**29 - 1))
    return torch.cat(found)


def _largest_of_groups(scores: Tensor, k: int) -> Tensor:
    """As `_largest`: those of k groups, and of the columns that are left over.

    The groups are the k whose highest scores are highest: a score outside them has k above it.
    """
    count = scores.shape[1]
    size = round(math.sqrt(count / k))
    groups = count // size
    grouped = groups * size
    # Group j has columns j, j + groups, j + 2 groups, …
    highest = scores[:, :grouped].unflatten(1, (size, groups)).amax(dim=1)
    best = _largest(highest, k).unsqueeze(1) + groups * torch.arange(size).unsqueeze(1)
    rest = torch.arange(grouped, count).expand(len(scores), -1)
    columns = torch.cat([best.flatten(1), rest], dim=1)
    return columns.gather(1, _largest(scores.gather(1, columns), k))


def _gathered(index: Tensor, count: int) -> bool:
    """Whether to read k rows for every token; else all `count` rows take part, most times zero.

    A row that is read for one token alone costs about two that pass through a matrix product.
    """
    return 2 * index.shape[1] < count


def _scattered(factors: Tensor, index: Tensor, first: int, end: int) -> Tensor:
    """A new (N, end − first): factors (N, k) at columns index − first, those before left out."""
    if index.shape[1] == end:  # all are kept, in their order
        return factors[:, first:].clone()
    dense = factors.new_zeros(factors.shape[0], end - first + 1)
    # Everything before `first` lands in one more column, in front, which is cut off.
    places = index if first == 0 else (index - first).clamp_min(-1)
    dense.scatter_add_(1, places + 1, factors)
    return dense[:, 1:]


def _add_rows(into: Tensor, factors: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add Σ_k factor · row[index] to `into` (N, d), of factors and index (N, k), rows (n, d)."""
    if not _gathered(index, len(rows)):
        into.addmm_(_scattered(factors, index, 0, len(rows)), rows)
        return
    for tokens in _slices(into, into.shape[1]):
        kept, weights = index[tokens], factors[tokens]
        into[tokens] += F.embedding_bag(kept, rows, per_sample_weights=weights, mode="sum")


def _products(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Products (N, k) of x (N, d) with the rows at index (N, k): the transpose of `_add_rows`."""
    if not _gathered(index, len(rows)):
        return F.linear(x, rows).gather(1, index)
    # The derivative of a weighted sum of rows by its weights is these products. Torch has it as a
    # kernel of its own, which forms nothing (N, k, d); the way through autograd would add up the
    # rows once more, for nothing.
    tokens, k = index.shape
    bags = torch.arange(tokens, device=x.device)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, index.flatten(), bags * k, bags.repeat_interleave(k), SUM
    )
    return products.view(tokens, k)


def _slices(rows: Tensor, width: int, numbers: int = IN_CACHE) -> list[slice]:
    """Slices of the tokens, so many that each makes `numbers` numbers, `width` for every token.

    On a GPU, or compiled, it is one of all.
    """
    if not at_hand(rows):
        return [slice(None)]
    count, step = len(rows), max(1, numbers // width)
    return [slice(first, first + step) for first in range(0, count, step)]
