"""Weights that move at test time: steps down the entropy of what the head says of an image.

No label is needed (test-time entropy minimisation, Wang et al. 2021, Tent), and nothing in memory
changes: each image has an offset of its own, in the weights or in the logarithms of shares of one,
which starts at zero and is gone when the image is read. So an answer does not depend on what else
is in a batch, and the same image has the same answer.

    g = gradient of H(p(y | x, offset)) in the offset,   offset ← offset − lr · g / ‖g‖

The offset of least entropy counts, of all steps and of none: it never rises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memtool.errors import ConfigError
from memtool.heads import RecalledHead
from memtool.methods.mira.recall import MemoryModel

Says = Callable[[Tensor, Tensor], Tensor]
"""Features (b, f) and weights (b, t) → probabilities (b, classes)."""


def says(head: RecalledHead) -> Says:
    """The probabilities by a head."""
    return lambda features, weights: head.probabilities(head(features, weights))


def settled(model: MemoryModel, say: Says, pixels: Tensor) -> Tensor | None:
    """Offsets (b, memories, t) of the coefficients of preprocessed pixels; None without steps.

    Raises ConfigError while `torch.export` writes a program, which has no gradients.
    """
    settings = model.settings
    if settings.test_time == "none":
        return None
    if torch.compiler.is_exporting():
        raise ConfigError(
            f"memory.test_time {settings.test_time} in a program of torch.export: a program has "
            "no gradients",
            remedy="--set memory.test_time=none at consolidation, or memory.attach()",
        )
    # Gradients cannot pass what was made in inference mode, so all begins anew outside of it.
    with torch.inference_mode(False):
        own = pixels.clone()
        with torch.no_grad():
            seen = model.seen_of(own)
        shape = (len(own), len(model.memory.blocks), len(model.values))
        kind = torch.promote_types(own.dtype, torch.float32)
        offset = torch.zeros(shape, dtype=kind, device=own.device)
        best, least = offset, torch.full((len(own),), torch.inf, device=own.device)
        for step in range(settings.test_steps + 1):
            steps_on = step < settings.test_steps
            with torch.set_grad_enabled(steps_on):
                offset = offset.detach().requires_grad_(steps_on)
                features, coefficients = model.mixed(own, seen, offset)
                entropy = entropy_of(say(features, coefficients.mean(dim=1)))
            lower = entropy.detach() < least
            best = torch.where(lower[:, None, None], offset.detach(), best)
            least = torch.where(lower, entropy.detach(), least)
            if steps_on:
                (slope,) = torch.autograd.grad(entropy.sum(), offset)
                length = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
                offset = offset - settings.test_lr * slope / length[:, None, None]
    return best


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy (b,) in nats of probabilities (b, classes)."""
    least = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(least).log()).sum(dim=1)
