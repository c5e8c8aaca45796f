"""Local weights of a Vision Transformer: a safetensors file with timm's tensor names."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from memtool.errors import CorruptError, MismatchError, NotFoundError

# Classification heads of a pre-trained file: features do not need them.
_HEAD_PREFIXES = ("head.", "head_dist.")


def load_vit_weights(vit: VisionTransformer, path: Path) -> None:
    """Load every tensor of `path` into `vit`, in the model's own precision (fp16 becomes fp32).

    A position embedding for another image size is resampled (bicubic, antialiased); tensors of a
    classification head are left out; nothing else may be missing, extra or of another shape.

    Raises NotFoundError, CorruptError (not a safetensors file) or MismatchError.
    """
    if not path.is_file():
        raise NotFoundError(f"no weights at {path}", expected="a safetensors file")
    try:
        given: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CorruptError(
            f"{path} cannot be read as safetensors: {error}",
            remedy="fetch or convert the file again",
        ) from error
    given = {name: t for name, t in given.items() if not name.startswith(_HEAD_PREFIXES)}
    own: dict[str, Tensor] = {
        name: t for name, t in vit.state_dict().items() if not name.startswith(_HEAD_PREFIXES)
    }
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise MismatchError(
            f"{path} does not fit the model: {_some('missing', missing)}, {_some('extra', extra)}",
            expected=f"the {len(own)} tensors of the model under timm's names",
            remedy="name the model that the file was made for",
        )
    if "pos_embed" in given:
        given["pos_embed"] = _resampled(given["pos_embed"], vit, path)
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise MismatchError(
                f"{name} in {path} has shape {tuple(tensor.shape)}",
                expected=str(tuple(own[name].shape)),
                remedy="name the model that the file was made for",
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise MismatchError(
                f"{name} in {path} ({tensor.dtype}) is not made of finite real numbers",
                expected="float16, bfloat16, float32 or float64 without nan and inf",
            )
    vit.load_state_dict(given, strict=False)


def _resampled(embedding: Tensor, vit: VisionTransformer, path: Path) -> Tensor:
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
    return resample_abs_pos_embed(
        embedding.float(), new_size=[rows, columns], old_size=[side, side], num_prefix_tokens=prefix
    )


def _some(word: str, names: list[str]) -> str:
    if not names:
        return f"none {word}"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown})"
