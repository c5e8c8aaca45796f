"""CODA-Prompt: keys and values in attention are a sum of components, weighed by the image.

    P(x) = Σ_m α_m P_m,   α_m = cos(q(x) ⊙ A_m, K_m)          in each of the blocks 0 to 4
    penalty = λ Σ_blocks ( |K Kᵀ − I|² + |A Aᵀ − I|² + |P Pᵀ − I|² ),   means of squares

q(x) is the feature of the frozen model. P_m are 4 keys and 4 values (length 8). Of M = 100
components every task learns an equal share, which starts orthogonal to all before and stays when
the task was learned; an image has those of all tasks so far. Source: Smith et al. 2023, CODA-Prompt
(COntinual Decomposed Attention-based Prompting): M, length, blocks, λ = 0.1. As in the public code
keys and values are learned as such, after the frozen projections; there λ is 1e-7 of such means,
or none, as in the toolbox PILOT (100 components, length 8, λ = 0; Adam at 0.001, 20 epochs).

Otherwise than there: no more components than the model is wide, as more are not orthogonal. Of a
model with fewer blocks those that it has.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.prefix import Prefix
from memtool.methods.baselines.prompted import Prompted
from memtool.streams.task import Task

BLOCKS = (0, 1, 2, 3, 4)

COMPONENTS = 100
"""M, of all tasks together."""

LENGTH = 8
"""Keys and values of a component, half of each."""

ORTHOGONAL = 0.1
"""λ."""


class Components(nn.Module):
    """The m components of a task: `keys` and `attention` (blocks, m, dim), and `prompts`.

    These are (blocks, m, p · dim): the keys, then the values.
    """

    def __init__(self, keys: Tensor, attention: Tensor, prompts: Tensor) -> None:
        super().__init__()
        self.keys, self.attention = nn.Parameter(keys), nn.Parameter(attention)
        self.prompts = nn.Parameter(prompts)


class CodaPrompt(Prompted):
    """`parts` has the components of every task so far."""

    id: ClassVar[str] = "coda-prompt"
    title: ClassVar[str] = "CODA-Prompt"

    def begin(self) -> None:
        """No components yet."""
        self.blocks = self.there(*BLOCKS)
        self.parts = nn.ModuleList()

    def before_task(self, task: Task) -> None:
        """Freeze the components of other tasks; new ones, orthogonal to these."""
        del task
        self.parts.requires_grad_(False)
        count = max(1, min(COMPONENTS, self.dim) // self.tasks)
        drawn = self.drawn(len(self.blocks), count, 2 + LENGTH, self.dim, low=-1.0, high=1.0)
        start = drawn[:, :, 0], drawn[:, :, 1], drawn[:, :, 2:].flatten(2)
        if self.parts:
            new = [orthogonal(mine, old) for mine, old in zip(start, self.joined(), strict=True)]
        else:
            new = [orthogonal(mine, mine[:, :0]) for mine in start]
        self.parts.append(Components(*new))

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, attention and prompts of all components, by block."""
        three = zip(*((one.keys, one.attention, one.prompts) for one in self.parts), strict=True)
        keys, attention, prompts = (torch.cat(found, dim=1) for found in three)
        return keys, attention, prompts

    def weights(self, query: Tensor) -> Tensor:
        """α (blocks, b, m) of images that ask (b, dim), float32 at least."""
        keys, attention, _ = self.joined()
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(keys.dtype)
            # cos(q ⊙ A, K) without q ⊙ A, which has a vector for each image and component.
            products = query @ (attention * F.normalize(keys, dim=-1)).mT
            lengths = query.square() @ attention.square().mT
            return products / lengths.sqrt().clamp_min(1e-12)

    def prefix(self, query: Tensor) -> Prefix:
        """The weighed sum of all components, in every block."""
        if not self.parts:
            return Prefix()
        mixed = self.weights(query) @ self.joined()[2]  # (blocks, b, p · dim)
        pairs = mixed.unflatten(-1, (2, LENGTH // 2, self.dim))
        return Prefix(attended=dict(zip(self.blocks, pairs, strict=True)))

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """How far keys, attention and prompts are from orthogonal, each for itself."""
        del inputs, targets
        total = logits.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):
            for rows in self.joined():
                unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
                total = total + (rows @ rows.mT - unit).square().mean(dim=(1, 2)).sum()
        return ORTHOGONAL * total


def orthogonal(rows: Tensor, others: Tensor) -> Tensor:
    """Rows (blocks, m, d) made orthonormal, and orthogonal to `others` (blocks, n, d).

    Where m + n > d they are of length one only. Float64 inside, out the type of `rows`.
    """
    both = torch.cat([others, rows], dim=1).double().mT
    basis = torch.linalg.qr(both).Q.mT[:, others.shape[1] :]
    if basis.shape[1] < rows.shape[1]:  # no room is left for all
        return F.normalize(rows, dim=-1)
    return basis.to(rows.dtype)
