"""Vectors split into clusters, so that what is not of one kind need not have one mean."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]
from torch import Tensor

from memtool.devices import exact


def clustered(vectors: Tensor, count: int, seed: int) -> Tensor:
    """The cluster (n,) of each of vectors (n, d), from 0; none of them is empty.

    By k-means from a start that `seed` draws. There are fewer than `count` where not so many
    vectors differ.
    """
    wide = exact(vectors).numpy()
    count = min(count, len(np.unique(wide, axis=0)))
    if count < 2:
        return torch.zeros(len(vectors), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cluster that lost its last vector; see below
        _, found = kmeans2(wide, count, minit="++", seed=np.random.default_rng(seed))
    return torch.from_numpy(np.unique(found, return_inverse=True)[1].reshape(-1))
