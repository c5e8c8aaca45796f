"""Losses on the logits of a batch, beside plain cross-entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from memtool.devices import sent

TEMPERATURE = 2.0
"""T of `distillation`."""


def both_ways(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of image→text and text→image cross-entropy of a batch: a scalar.

    logits (b, classes) of images and the classes' texts, −infinity for classes that do not take
    part; labels (b,). A text that belongs to several images of the batch has them all as target,
    with equal shares. With one image a class this is the loss of CLIP (Radford et al. 2021). Labels
    on the CPU save a wait for the device of the logits: how many texts there are depends on them.
    """
    present = sent(labels.unique(), logits.device)
    labels = sent(labels, logits.device)
    of_text = logits[:, present].float()  # (b, k)
    target = (labels.unsqueeze(1) == present).float()
    to_text = F.cross_entropy(logits.float(), labels)
    to_image = F.cross_entropy(of_text.T, (target / target.sum(dim=0)).T)
    return (to_text + to_image) / 2


def over_seen_texts(logits: Tensor, labels: Tensor, texts: int) -> Tensor:
    """The loss that MoRAM was published with: a scalar, of logits (b, classes) and labels (b,).

    Images are told apart among the classes that are not −infinity, those of the task. Every text
    tells apart the images of the batch, each of its own counting whole, in a mean over `texts`:
    those of all tasks so far. One without an image in the batch, as all of earlier tasks, adds
    nothing but to the number. The two are added.
    """
    logits = logits.float()
    own = logits.gather(1, labels.unsqueeze(1))[:, 0]
    over_images = logits[:, labels].logsumexp(dim=0)  # of the text of every image
    return F.cross_entropy(logits, labels) + (over_images - own).sum() / texts


def distillation(logits: Tensor, wanted: Tensor) -> Tensor:
    """T² KL(softmax(wanted / T) ‖ softmax(logits / T)), the mean over the batch (b, classes)."""
    divergence = F.kl_div(
        F.log_softmax(logits.float() / TEMPERATURE, dim=1),
        F.log_softmax(wanted.float() / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return TEMPERATURE**2 * divergence
