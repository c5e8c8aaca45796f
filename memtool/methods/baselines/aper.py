"""APER: frozen and first-session-adapted features side by side, nearest class mean by cosine.

    score_c = cos([f; f*], p_c),   p_c the mean of [f; f*] over the training images of class c

f are the features of the frozen model, f* those under an adapter that learned the first task.
Source: Zhou et al. 2023, "Revisiting class-incremental learning with pre-trained models:
generalizability and adaptivity are all you need" (first called ADAM). As published: features raw,
not normalised before they are joined; no temperature. Ours: LoRA with the stream's rank, epochs and
optimiser (published: SSF, prompts, adapters or batch norm in ViT-B/16, 20 epochs of SGD at 0.01).
Of one task without its frozen half it is EASE. Beside the toolbox PILOT's on the same features:
`python -m benchmarks rivals --pilot PATH`.
"""

from __future__ import annotations

from memtool.heads import CosineHead, FeatureStatistics
from memtool.methods.baselines.first_session import FirstSession
from memtool.settings import HeadSettings


def _nearest(counted: FeatureStatistics, settings: HeadSettings) -> CosineHead:
    """Cosines to the means of the classes seen."""
    del settings
    known = counted.counts.nonzero()[:, 0]
    means = counted.sums[known] / counted.counts[known].unsqueeze(1)
    return CosineHead.of_classes(means, known, counted.classes, 1.0)


APER = FirstSession("aper", "APER", _nearest, beside=True)
