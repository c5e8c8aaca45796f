"""What the atoms of a bank do while images or texts run through the backbone.

`watched` recalls a bank and shows the input of every adapted module to a callback. From that input
alone follow the gate's weights, and with them all that is asked of a bank: which task's atoms are
chosen (`TaskShares`), what every atom adds (`Contributions`), where one fires (`SiteWeights`) and
what the atoms of a task add now and added when they were learned (`Drifts`). A watch counts
all tokens alike: texts run one by one, as padding is no token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtool.adapters.atoms import AtomBank, AtomGate, ModuleAtoms, activations
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.devices import exact
from memtool.errors import MismatchError
from memtool.learning.passes import each
from memtool.memories.rank1 import Rank1Memory
from memtool.streams.task import Images, Texts
from memtool.workspace import Workspace

Watch = Callable[[ModuleAtoms, Tensor], None]
"""What sees the atoms of a module and its input x (b, tokens, d_in)."""


@dataclass(frozen=True, eq=False)
class WatchedMixture(Mixture):
    """A mixture of atoms that shows the input of every module before it adds to the output."""

    watch: Watch | None = None

    def add_to(self, y: Tensor, x: Tensor, module: str) -> Tensor:
        """As `Mixture.add_to`."""
        found = self.values.modules.get(module)
        if isinstance(found, ModuleAtoms) and self.watch is not None:
            self.watch(found, x)
        return super().add_to(y, x, module)


def watched(bank: Rank1Memory, gate: AtomGate, watch: Watch) -> Recall:
    """What a backbone recalls from a bank, in evaluation, while `watch` sees every input."""
    plain = bank.eval().recall(gate)

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        mixture = plain(block, hidden)
        if mixture is None:
            return None
        return WatchedMixture(**vars(mixture), watch=watch)

    return recall


@dataclass(eq=False)
class TaskShares:
    """A watch that counts, for every sample and block, whose atoms its tokens choose.

    A share is the gate's weight on the atoms of a task, mean over the tokens and sites of a block.
    With `counted` they are the weights that count in evaluation: what is missing to one fell below
    the threshold. Without, the threshold is off and they sum to one.
    """

    tasks: Sequence[int]
    gate: AtomGate
    counted: bool = True
    _sums: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, atoms: ModuleAtoms, x: Tensor) -> None:
        """See one module."""
        for site, bank in zip(atoms.sites, atoms.banks, strict=True):
            if len(bank):
                weights = activations(x, bank, self.gate, training=not self.counted)
                mine = [bank.owner == task for task in self.tasks]
                of_task = torch.stack(mine, dim=1).to(weights.dtype)
                with torch.autocast(x.device.type, enabled=False):
                    shares = weights.mean(dim=1) @ of_task
                self._sums.setdefault(site.block, []).append(shares)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that were seen, ascending."""
        return tuple(sorted(self._sums))

    def taken(self) -> Tensor:
        """The shares (b, blocks, tasks) of the batch that was seen; the next one starts anew."""
        found = torch.stack(
            [torch.stack(self._sums[block]).mean(dim=0) for block in self.blocks], dim=1
        )
        self._sums = {}
        return found


def task_shares(
    work: Workspace,
    bank: Rank1Memory,
    gate: AtomGate,
    tasks: Sequence[int],
    samples: Images | Texts,
) -> tuple[Tensor, tuple[int, ...]]:
    """The counted shares (n, blocks, tasks) of samples, as in `TaskShares`, and the blocks."""
    shares = TaskShares(tasks, gate)
    blocks: tuple[int, ...] = ()

    def taken() -> Tensor:
        nonlocal blocks
        blocks = shares.blocks
        return shares.taken()

    return each(work, samples, watched(bank, gate, shares), taken), blocks


def contribution(x: Tensor, bank: AtomBank, gate: AtomGate, task: int) -> Tensor:
    """What the atoms of a task add to every token: Σ_i w_i s_i z_i B_i, (b, tokens, d_out).

    In the dtype of the scores, float32 at least, also where autocast is on.
    """
    mine = bank.owner == task
    used = activations(x, bank, gate)[..., mine]
    with torch.autocast(x.device.type, enabled=False):
        responses = x.to(used.dtype) @ bank.keys[mine].to(used.dtype).t()
        return (used * responses * bank.scaling[mine]) @ bank.values[mine].to(used.dtype)


@dataclass(frozen=True)
class Drift:
    """What atoms add now against what they added then, over all sites and tokens.

    norm: length now over length then; difference: |now − then| over length then. Both None where
    they added nothing then.
    """

    norm: float | None
    difference: float | None


@dataclass(eq=False)
class Drifts:
    """A watch that asks what the atoms of a task add in each of the `later` banks.

    It sees the inputs of the modules as they were in the bank of then: a difference is the gate's
    alone, made by atoms that came (or went), and not that of layers below. float32.
    """

    task: int
    gate: AtomGate
    later: Sequence[Rank1Memory]
    _before: float = 0.0
    _now: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, atoms: ModuleAtoms, x: Tensor) -> None:
        """See one module."""
        x = x.float()
        self._now = self._now or [(0.0, 0.0)] * len(self.later)
        for site, bank in zip(atoms.sites, atoms.banks, strict=True):
            old = contribution(x, bank, self.gate, self.task)
            self._before += float(exact(old).square().sum())
            for place, memory in enumerate(self.later):
                new = contribution(x, memory.bank(site.name), self.gate, self.task)
                length, apart = self._now[place]
                length += float(exact(new).square().sum())
                apart += float(exact(new - old).square().sum())
                self._now[place] = length, apart

    def found(self) -> list[Drift]:
        """The drift in each of the later banks, over all that was seen."""
        if not self._before:
            return [Drift(None, None) for _ in self.later]
        return [
            Drift((length / self._before) ** 0.5, (apart / self._before) ** 0.5)
            for length, apart in self._now
        ]


def frozen_drift(
    work: Workspace,
    then: Rank1Memory,
    later: Sequence[Rank1Memory],
    gate: AtomGate,
    task: int,
    samples: Images | Texts,
) -> list[Drift]:
    """How far the atoms of a task drifted in each of the `later` banks, as in `Drifts`.

    The samples run once, through the bank as it was when the task was learned. Images in float32.
    """
    drifts = Drifts(task, gate, later)
    each(work, samples, watched(then, gate, drifts), exact=True)
    return drifts.found()


@dataclass(eq=False)
class Contributions:
    """A watch that adds up what every atom adds: |w s z| |B|, over all tokens that it sees."""

    gate: AtomGate
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)

    def __call__(self, atoms: ModuleAtoms, x: Tensor) -> None:
        """See one module."""
        for site, here in zip(atoms.sites, atoms.banks, strict=True):
            used = activations(x, here, self.gate)
            with torch.autocast(x.device.type, enabled=False):
                responses = x.to(used.dtype) @ here.keys.to(used.dtype).t()
            lengths = here.values.norm(dim=1) * here.scaling
            each = exact((used * responses).abs().flatten(0, -2)).sum(dim=0) * lengths.cpu()
            self._sums[site.name] = self._sums.get(site.name, torch.zeros_like(each)) + each
            self._tokens[site.name] = self._tokens.get(site.name, 0) + x[..., 0].numel()

    def means(self) -> dict[str, Tensor]:
        """By site the mean over the tokens, (n,), on the CPU."""
        return {name: total / self._tokens[name] for name, total in self._sums.items()}


def contributions(
    work: Workspace, bank: Rank1Memory, gate: AtomGate, samples: Sequence[Images | Texts]
) -> Mapping[str, Tensor]:
    """What every atom adds on average, by site: mean over all tokens of |w s z| |B|, (n,).

    Each set of samples counts alike, however many it has. Images in float32.
    """
    found = []
    for some in samples:
        watch = Contributions(gate)
        each(work, some, watched(bank, gate, watch), exact=True)
        found.append(watch.means())
    return {name: torch.stack([one[name] for one in found]).mean(dim=0) for name in found[0]}


@dataclass(eq=False)
class SiteWeights:
    """A watch that keeps the gate's weights of one site."""

    site: str
    gate: AtomGate
    _seen: list[Tensor] = field(default_factory=list)

    def __call__(self, atoms: ModuleAtoms, x: Tensor) -> None:
        """See one module."""
        for known, here in zip(atoms.sites, atoms.banks, strict=True):
            if known.name == self.site:
                self._seen.append(activations(x, here, self.gate))

    def taken(self) -> Tensor:
        """The weights (b, tokens, n) of the batch that was seen last."""
        return self._seen.pop()


def activation_map(
    work: Workspace,
    bank: Rank1Memory,
    gate: AtomGate,
    site: str,
    samples: Images | Texts,
    *,
    by_text: bool = False,
) -> Tensor:
    """The gate's weights of all atoms of one site, float64.

    (tokens, n): of images the mean over them, and of the one prompt that is there. `by_text` gives
    (texts, n), means over the tokens of each.
    """
    names = [known.name for known in bank.sites]
    if site not in names:
        raise MismatchError(f"no atoms at {site!r}", expected=f"one of {', '.join(names)}")
    weights = SiteWeights(site, gate)
    recall = watched(bank, gate, weights)
    if isinstance(samples, Images):
        return each(work, samples, recall, weights.taken).mean(dim=0).double()
    if by_text:
        return each(work, samples, recall, lambda: exact(weights.taken()).mean(dim=1))
    return each(work, samples, recall, lambda: weights.taken()[0]).double()
