"""SD-LoRA: directions of earlier tasks stay fixed, how much of each is used goes on learning.

    ΔW = Σ_{k<t} m_k B_k A_k / |B_k A_k| + s B_t A_t        |·| the Frobenius norm of a site's map

One magnitude m_k for every site and earlier task; nothing is replayed and no adapter is chosen.
Source: Wu et al. 2025 (ICLR). With one task it is sequential LoRA.

The newest component learns as LoRA does: its B begins at zero, where it has no direction. When its
task ends, it is divided into magnitude and direction, which leaves the model as it was. Ours: rank,
epochs and optimiser of the stream (published: rank 10 in ViT-B/16, 8e-3, 20 epochs); magnitudes go
on from where the task before left them; neither of the paper's two savings of rank. A public copy
of the code divides by |B| |A|, which is no less than |B A|, and has one magnitude a task for all
sites, that starts at 0.8 in every task anew, of the newest component too (there SGD at 0.01).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import every
from memtool.adapters.values import (
    AdapterValues,
    BlockValues,
    ModuleValues,
    Recall,
    over_groups,
)
from memtool.methods.baselines.branches import Branches
from memtool.streams.task import Task


class SdLora(Branches):
    """`past` are directions of length one at every site; `magnitudes` (t · sites,) how much."""

    id: ClassVar[str] = "sd-lora"
    title: ClassVar[str] = "SD-LoRA"

    def begin(self) -> None:
        """No directions yet."""
        super().begin()
        self.magnitudes: nn.Parameter | None = None

    def before_task(self, task: Task) -> None:
        """Divide what was learned into magnitude and direction, and begin a component."""
        if not self.seen:
            return
        scaling = self.values.scaling
        had = [] if self.magnitudes is None else [self.magnitudes.detach()]
        super().before_task(task)
        assert self.past is not None
        new = scaling * divided(self.past)
        self.past.scaling.fill_(1.0)
        self.magnitudes = nn.Parameter(torch.cat([*had, new]))

    def recall(self) -> Recall | None:
        """The directions as much as their magnitudes say, and the newest component."""
        past, new = self.past, self.values
        if past is None or self.magnitudes is None:
            return every(new)
        each = iter(self.magnitudes.view(len(past), -1).unbind(1))
        scaled: dict[tuple[int, str], list[Tensor]] = {}
        for module, site, _, b in sites_of(past):
            scaled.setdefault((site.block, module), []).append(b * next(each)[:, None, None])

        def recall(block: int, hidden: Tensor) -> Mixture | None:
            old, added = past.block(block), new.block(block)
            if old is None or added is None:
                return None
            modules = {}
            for name, one in old.modules.items():
                other = added.modules[name]
                pairs = zip(scaled[block, name], other.b, strict=True)
                b = tuple(torch.cat(pair) for pair in pairs)
                modules[name] = ModuleValues(one.sites, torch.cat([one.a, other.a]), b)
            joined = BlockValues(modules, torch.cat([old.scaling, added.scaling]))
            return Mixture.weighted(joined, hidden.new_ones(len(hidden), len(joined)))

        return recall


@torch.no_grad()
def divided(values: AdapterValues) -> Tensor:
    """Give the last adapter a map of length one at every site; the lengths (sites,) it had."""
    lengths = []
    for _, site, a, b in sites_of(values):
        lengths.append(product_norm(a[-1], over_groups(b[-1:], site.groups)[0]))
        b[-1] /= lengths[-1].clamp_min(torch.finfo(b.dtype).tiny)
    return torch.stack(lengths)


def sites_of(values: AdapterValues) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """Module, site, A (t, r, in) and B transposed of every site, in one order.

    B is (t, r / groups, out), as `ModuleValues` has it.
    """
    for block in values.layout.blocks:
        here = values.block(block)
        assert here is not None
        for name, module in here.modules.items():
            for place, b in enumerate(module.b):
                yield name, module.sites[place], module.a[:, place], b


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """The Frobenius norm of B A, of A (r, in) and B transposed (r, out)."""
    gram = (a.double() @ a.double().t()) * (b.double() @ b.double().t())
    return gram.sum().clamp_min(0).sqrt().to(a.dtype)
