"""S-Prompts: every domain has prompts and a head of its own; a test finds the domain of an image.

    x' = [class token; P_t; x],   features as the model pools them, head t
    in a test: t = the domain of the nearest of all centroids, by Manhattan distance

The centroids are those of k-means, k = 5 a domain, on features of the frozen model, normalised to
length one. Nothing of a domain changes when others are learned. Source: Wang et al. 2022, S-Prompts
Learning with Pre-trained Transformers (S-iPrompts, the one with images alone and linear heads):
length 10, k, distance, and prompts that start uniform in ±1/√dim.

Otherwise than there: the optimiser and rate of all baselines (there momentum 0.9 at rate 0.01).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.prefix import Prefix
from memtool.errors import ConfigError
from memtool.heads import LinearClassifier
from memtool.learning.objective import Objective
from memtool.memories.clusters import clustered
from memtool.methods.baselines.frozen import frozen_features
from memtool.methods.baselines.prompted import Prompted
from memtool.streams.task import Task
from memtool.workspace import Workspace

LENGTH = 10
"""Tokens of a domain's prompt."""

CLUSTERS = 5
"""k."""


class SPrompts(Prompted):
    """`prompts`, `heads` and `centroids` (k, dim) of every domain so far."""

    id: ClassVar[str] = "s-prompts"
    title: ClassVar[str] = "S-Prompts"

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        """As `Prompted`; raises ConfigError where tasks are not domains of the same classes."""
        require_domains(work)
        super().__init__(work, tasks, objective)
        self.label = f"{self.title}, linear head a domain"

    def begin(self) -> None:
        """No domain yet."""
        self.prompts = nn.ParameterList()
        self.heads: list[LinearClassifier] = []
        self.centroids: list[Tensor] = []

    def before_task(self, task: Task) -> None:
        """A prompt for this domain, and a head that starts at zero."""
        del task
        self.prompts.requires_grad_(False)
        bound = self.dim**-0.5
        self.prompts.append(nn.Parameter(self.drawn(LENGTH, self.dim, low=-bound, high=bound)))
        with torch.no_grad():
            for parameter in self.objective.head.parameters():
                parameter.zero_()

    def after_task(self, task: Task) -> None:
        """Keep the head, and the centroids of what the frozen model makes of the domain."""
        self.heads.append(self.objective.classifier())
        found = F.normalize(frozen_features(self.work, task.train), dim=1)
        number = clustered(found, CLUSTERS, self.work.training_seed(task.number))
        centroids = torch.stack([found[number == one].mean(dim=0) for one in number.unique()])
        self.centroids.append(centroids.to(self.work.engine.device))

    def domain_of(self, query: Tensor) -> Tensor:
        """The domain (b,) of images: the one that is learned, or in a test the nearest."""
        if self.training:
            return query.new_full((len(query),), len(self.prompts) - 1, dtype=torch.int64)
        query = F.normalize(query.float(), dim=1)
        nearest = [torch.cdist(query, one, p=1).amin(dim=1) for one in self.centroids]
        return torch.stack(nearest).argmin(dim=0)

    def prefix(self, query: Tensor) -> Prefix:
        """The prompts of the images' domains."""
        return Prefix(torch.stack([*self.prompts])[self.domain_of(query)])

    def forward(self, inputs: Tensor, targets: Tensor | None = None, seed: int = 0) -> Tensor:
        """Logits (b, classes) of images, in a test by the head of their domain."""
        if self.training:
            return super().forward(inputs, targets, seed)
        features = self.features(inputs)
        logits = torch.stack([head(features) for head in self.heads], dim=1)
        return logits[torch.arange(len(logits)), self.domain_of(self.query)].float()

    def scores(self, task: Task) -> Tensor:
        """Scores (n, classes) of a task's test images: features of domains have no common head."""
        return self.work.engine.predict(self, task.test.images)


def require_domains(work: Workspace) -> None:
    """Raise ConfigError where tasks are not domains of the same classes."""
    if work.config.stream.setting not in ("dil", "dgcl"):
        raise ConfigError(
            f"{SPrompts.title} under stream.setting {work.config.stream.setting}",
            expected="stream.setting dil or dgcl, where tasks are domains of the same classes",
            remedy="--baselines l2p,dual-prompt,coda-prompt",
        )
