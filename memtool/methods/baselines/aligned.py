"""Classifier alignment: a head learns once more from features drawn of every class's Gaussian.

    N(μ_c, Σ_c + ε I)    of the features of a class, taken when its task was learned

As many draws from every class, old or new, so that classes of different tasks become comparable.
Nothing of the data is kept but the moments: dim² numbers a class. Source: SLCA, Zhang et al. 2023
(after Zhu et al. 2021); normalised logits are of Wei et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import exact
from memtool.heads import LinearClassifier

EPSILON = 1e-4
"""Added to the diagonal of a covariance: a class may have fewer images than features."""
DRAWS = 256
"""Draws of a class in an epoch, and draws in a step."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`mean` (dim,) and the lower factor (dim, dim) of the covariance; float64, on the CPU."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """That of features (n, dim), n at least 1."""
        rows = exact(features)
        mean = rows.mean(dim=0)
        centred = rows - mean
        covariance = centred.t() @ centred / max(1, len(rows) - 1)
        covariance.diagonal().add_(EPSILON)
        return cls(mean, torch.linalg.cholesky(covariance))

    def nearer(self, factor: float) -> Gaussian:
        """The same about `factor` times its mean."""
        return Gaussian(factor * self.mean, self.factor)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Features (count, dim), float32."""
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + noise @ self.factor.t()).float()


def gaussians(features: Tensor, labels: Tensor, classes: Sequence[int]) -> list[Gaussian]:
    """One for each of `classes`, of features (n, dim) with labels (n,)."""
    return [Gaussian.of(features[labels == one]) for one in classes]


def aligned(
    head: LinearClassifier,
    known: Sequence[Gaussian],
    targets: Sequence[int],
    *,
    epochs: int,
    lr: float,
    temperature: float | None,
    generator: torch.Generator,
    tasks: Sequence[int] | None = None,
) -> LinearClassifier:
    """The head after so many epochs of SGD on draws, on the CPU; rows of no target stay.

    `targets[k]` is the row of Gaussian k. `temperature` τ: cross-entropy of z / (τ |z|) instead of
    the logits z, which leaves their size alone. With `tasks`, the task that row i of the head is
    of, |z| is the mean over the tasks of the size of their own logits, as SLCA's code has it. SGD
    with momentum 0.9, decay 5e-4 and a cosine.
    """
    rows = torch.tensor(sorted(set(targets)))
    owners = [0 if tasks is None else tasks[row] for row in rows.tolist()]
    groups = [
        torch.tensor([i for i, at in enumerate(owners) if at == t]) for t in sorted({*owners})
    ]
    places = torch.searchsorted(rows, torch.tensor(list(targets)))
    weight = head.weight[rows].detach().cpu().clone().requires_grad_(True)
    bias = head.bias[rows].detach().cpu().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        drawn = torch.cat([one.draw(DRAWS, generator) for one in known])
        wanted = places.repeat_interleave(DRAWS)
        order = torch.randperm(len(drawn), generator=generator)
        for step in order.split(DRAWS):
            logits = F.linear(drawn[step], weight, bias)
            if temperature is not None:
                sizes = [logits[:, own].norm(dim=1, keepdim=True) for own in groups]
                size = torch.stack(sizes).mean(dim=0).clamp_min(1e-7)
                logits = logits / (temperature * size)
            optimizer.zero_grad()
            F.cross_entropy(logits, wanted[step]).backward()
            optimizer.step()
    found = LinearClassifier(head.weight.detach().cpu().clone(), head.bias.detach().cpu().clone())
    found.weight[rows], found.bias[rows] = weight.detach(), bias.detach()
    return found
