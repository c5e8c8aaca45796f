"""Samples that run through a frozen model under a recall, while something looks on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.streams.task import Images, Texts
from memtool.workspace import Workspace


def nothing() -> Tensor:
    """What is taken of a batch where only the looking on counts."""
    return torch.empty(0)


def each(
    work: Workspace,
    samples: Images | Texts,
    recall: Recall | None,
    taken: Callable[[], Tensor] = nothing,
    *,
    exact: bool = False,
) -> Tensor:
    """What `taken` gives (b, ...) after every batch, joined, on the CPU.

    Texts run one by one, and only their prompts: so no token is padding. `exact` as in
    `Engine.predict`, of images.
    """
    backbone = work.backbone
    if isinstance(samples, Images):

        def run(batch: Tensor) -> Tensor:
            backbone.features(backbone.preprocess(batch), recall)
            return taken()

        return work.engine.predict(run, samples.images, exact=exact)
    found = []
    for prompt in samples.prompts:
        tokens = backbone.encode([prompt]).tokens.to(work.engine.device)
        with torch.no_grad(), work.engine.autocast():
            backbone.hidden(tokens, recall)
            found.append(taken().cpu())
    return torch.cat(found)
