"""Local weights of a model of timm: a safetensors file with timm's tensor names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from memtool.backbones.weight_files import read_weights
from memtool.errors import MismatchError

# Classification heads of a pre-trained file: features do not need them.
_HEAD_PREFIXES = ("head.", "head_dist.")

# Counts and tables that a model makes itself, and files may lack.
_MADE = ("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table")


def load_vit_weights(vit: Any, path: Path) -> None:
    """Load every tensor of `path` into `vit`, in the model's own precision (fp16 becomes fp32).

    A position embedding for another image size is resampled (bicubic, antialiased); tensors of a
    classification head are left out. Errors as `read_weights`.
    """

    def resample(given: dict[str, Tensor]) -> None:
        if "pos_embed" in given and hasattr(vit, "no_embed_class"):
            given["pos_embed"] = _resampled(given["pos_embed"], vit, path)

    own = vit.state_dict()
    given = read_weights(
        path,
        own,
        "timm's",
        left_out=(*_HEAD_PREFIXES, *_classifiers(vit, own)),
        made=_MADE,
        resample=resample,
    )
    vit.load_state_dict(given, strict=False)


def _classifiers(model: Any, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Beginnings of the names of a model's classifier, which it was made without."""
    said = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (said,) if isinstance(said, str) else tuple(said)
    return tuple(f"{name}." for name in names if not any(n.startswith(f"{name}.") for n in own))


def _resampled(embedding: Tensor, vit: Any, path: Path) -> Tensor:
    """The position embedding (1, prefix + patches, dim) for the model's own grid of patches."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    rows, columns = vit.patch_embed.grid_size
    if embedding.ndim != 3 or embedding.shape[1] == prefix + rows * columns:
        return embedding
    patches = embedding.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise MismatchError(
            f"pos_embed in {path} has {embedding.shape[1]} positions, {prefix} of them no patches",
            expected=f"a square number of patches to resample to {rows} x {columns}",
        )
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(
        embedding.float(), new_size=[rows, columns], old_size=[side, side], num_prefix_tokens=prefix
    )
