"""FSA: first-session adaptation, then linear discriminant analysis of the features.

Class means and one covariance for all classes, from running moments. Source: Panos et al. 2023,
"First session adaptation: a strong replay-free baseline for class-incremental learning". Ours: LoRA
with the stream's rank, epochs and optimiser (published: FiLM layers or the whole body of
EfficientNet-B0 and ViT-B/16, adapted under a linear head that is then discarded, as here); the
covariance is shrunk by `head.ridge`, as in every LDA head here. Domain generalisation has all
sources at once: there FSA is `erm` under its LDA head.
"""

from __future__ import annotations

from functools import partial

from memtool.heads import solve_head
from memtool.methods.baselines.first_session import FirstSession

FSA = FirstSession("fsa", "FSA, LDA head", partial(solve_head, "lda"))
