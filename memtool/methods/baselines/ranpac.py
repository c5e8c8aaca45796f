"""RanPAC: ridge on a random projection of the features under a first-session adapter.

    h = ReLU(W f),   W (M, dim) normal, drawn once;   scores = (Σ y hᵀ) (Σ h hᵀ + λ I)⁻¹ h

Source: McDonnell et al. 2023, "RanPAC: random projections and pre-trained models for continual
learning". As published: M = 10,000 (`head.width`); W from the standard normal; λ from 10⁻⁸ to 10⁸
in steps of ten, by the squared error on 20 % of a task's training images under a rule of the other
80 %. Ours: LoRA with the stream's rank, epochs and optimiser (published: SSF, AdaptFormer or
prompts in ViT-B/16, 20 epochs of SGD at 0.01); errors of all tasks are summed to choose λ, where
the public code goes by the last task; an intercept that is not penalised (the toolbox PILOT has
none, and scores by the cosine to the ridge's rows). Without the projection it is the ridge head.
Beside PILOT's on the same features: `python -m benchmarks rivals --pilot PATH`.
"""

from __future__ import annotations

from memtool.heads import FeatureStatistics, LinearClassifier
from memtool.methods.baselines.first_session import FirstSession
from memtool.settings import HeadSettings


def _solved(counted: FeatureStatistics, settings: HeadSettings) -> LinearClassifier:
    """Ridge with the λ of least error, whatever `head.penalty` says."""
    del settings
    return counted.rp_ridge(None)


RANPAC = FirstSession("ranpac", "RanPAC", _solved, projected=True)
