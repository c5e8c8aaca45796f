"""What the atoms of a bank do while images run through the backbone.

`watched` recalls a bank and shows the input of every adapted module to a callback. From that input
alone follow the gate's weights, and with them all that is asked of a bank: which task's atoms are
chosen (`TaskShares`), what the atoms of a task add now and added when they were learned
(`frozen_drift`), which atoms do nothing (`contributions`) and where one fires (`activation_map`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.atoms import AtomBank, AtomGate, ModuleAtoms, activations
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.backbones.interface import Backbone
from memtool.engine import Engine
from memtool.errors import MismatchError
from memtool.memories.rank1 import Rank1Memory

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
        return WatchedMixture(mixture.values, mixture.kind, mixture.gate, watch)

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
                owners = torch.tensor(self.tasks, device=bank.owner.device)
                of_task = (bank.owner.unsqueeze(1) == owners).to(weights.dtype)
                self._sums.setdefault(site.block, []).append(weights.mean(dim=1) @ of_task)

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
    engine: Engine,
    backbone: Backbone,
    bank: Rank1Memory,
    gate: AtomGate,
    tasks: Sequence[int],
    images: npt.NDArray[np.uint8],
) -> tuple[Tensor, tuple[int, ...]]:
    """The counted shares (n, blocks, tasks) of images, as in `TaskShares`, and the blocks."""
    shares = TaskShares(tasks, gate)
    recall = watched(bank, gate, shares)
    blocks: tuple[int, ...] = ()

    def run(batch: Tensor) -> Tensor:
        nonlocal blocks
        backbone.features(backbone.preprocess(batch), recall)
        blocks = shares.blocks
        return shares.taken().flatten(1)

    joined = engine.predict(run, images)
    return joined.unflatten(1, (len(blocks), len(tasks))), blocks


def contribution(x: Tensor, bank: AtomBank, gate: AtomGate, task: int) -> Tensor:
    """What the atoms of a task add to every token: Σ_i w_i s_i z_i B_i, (b, tokens, d_out)."""
    mine = bank.owner == task
    used = activations(x, bank, gate)[..., mine]
    responses = (x @ bank.keys[mine].to(x.dtype).t()).to(used.dtype)
    return (used * responses * bank.scaling[mine]) @ bank.values[mine].to(used.dtype)


@dataclass(frozen=True)
class Drift:
    """What atoms add now against what they added then, over all sites and tokens.

    norm: length now over length then; difference: |now − then| over length then. Both None where
    they added nothing then.
    """

    norm: float | None
    difference: float | None


def frozen_drift(
    engine: Engine,
    backbone: Backbone,
    then: Rank1Memory,
    later: Sequence[Rank1Memory],
    gate: AtomGate,
    task: int,
    images: npt.NDArray[np.uint8],
) -> list[Drift]:
    """How far the atoms of a task drifted in each of the `later` banks.

    The images run once, through the bank as it was when the task was learned, and every bank is
    asked at the inputs that its modules had then: a difference is the gate's alone, made by atoms
    that came (or went), and not that of layers below. float32.
    """
    before = 0.0
    lengths, apart = [0.0] * len(later), [0.0] * len(later)

    def watch(atoms: ModuleAtoms, x: Tensor) -> None:
        nonlocal before
        for site, bank in zip(atoms.sites, atoms.banks, strict=True):
            old = contribution(x, bank, gate, task)
            before += float(old.double().square().sum())
            for place, memory in enumerate(later):
                new = contribution(x, memory.bank(site.name), gate, task)
                lengths[place] += float(new.double().square().sum())
                apart[place] += float((new - old).double().square().sum())

    recall = watched(then, gate, watch)
    engine.predict(
        lambda batch: backbone.features(backbone.preprocess(batch), recall), images, exact=True
    )
    if not before:
        return [Drift(None, None) for _ in later]
    return [
        Drift((length / before) ** 0.5, (distance / before) ** 0.5)
        for length, distance in zip(lengths, apart, strict=True)
    ]


def contributions(
    engine: Engine,
    backbone: Backbone,
    bank: Rank1Memory,
    gate: AtomGate,
    images: Sequence[npt.NDArray[np.uint8]],
) -> Mapping[str, Tensor]:
    """What every atom adds on average, by site: mean over all tokens of |w s z| |B|, (n,).

    Each array of images counts alike, however many it has. float32.
    """
    found: dict[str, Tensor] = {}
    for some in images:
        tokens: dict[str, int] = {}
        sums: dict[str, Tensor] = {}

        def watch(
            atoms: ModuleAtoms,
            x: Tensor,
            tokens: dict[str, int] = tokens,
            sums: dict[str, Tensor] = sums,
        ) -> None:
            for site, here in zip(atoms.sites, atoms.banks, strict=True):
                used = activations(x, here, gate)
                responses = (x @ here.keys.to(x.dtype).t()).to(used.dtype)
                lengths = here.values.norm(dim=1) * here.scaling
                each = (used * responses).abs().flatten(0, -2).double().sum(dim=0) * lengths
                sums[site.name] = sums.get(site.name, torch.zeros_like(each)) + each
                tokens[site.name] = tokens.get(site.name, 0) + x[..., 0].numel()

        recall = watched(bank, gate, watch)
        engine.predict(
            lambda batch, recall=recall: backbone.features(backbone.preprocess(batch), recall),
            some,
            exact=True,
        )
        for name, total in sums.items():
            mean = total.cpu() / tokens[name] / len(images)
            found[name] = found.get(name, torch.zeros_like(mean)) + mean
    return found


def activation_map(
    engine: Engine,
    backbone: Backbone,
    bank: Rank1Memory,
    gate: AtomGate,
    site: str,
    images: npt.NDArray[np.uint8],
) -> Tensor:
    """The gate's weights (tokens, n) of all atoms of one site, mean over the images."""
    names = [known.name for known in bank.sites]
    if site not in names:
        raise MismatchError(f"no atoms at {site!r}", expected=f"one of {', '.join(names)}")
    seen: list[Tensor] = []

    def watch(atoms: ModuleAtoms, x: Tensor) -> None:
        for known, here in zip(atoms.sites, atoms.banks, strict=True):
            if known.name == site:
                seen.append(activations(x, here, gate))

    recall = watched(bank, gate, watch)

    def run(batch: Tensor) -> Tensor:
        backbone.features(backbone.preprocess(batch), recall)
        return seen.pop()

    return engine.predict(run, images).mean(dim=0)
