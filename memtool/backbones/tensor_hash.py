"""One sha256 for a set of named tensors: the identity of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 24


def tensor_sha256(tensors: Mapping[str, Tensor], floats: torch.dtype | None = None) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    Equal for equal tensors whatever their order, device or memory layout; different as soon as a
    name, a dtype, a shape or a bit differs. Bytes are hashed in chunks, as they lie in memory on a
    little-endian machine. With `floats`, numbers with a point count as those of that dtype.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if floats is not None and tensor.is_floating_point():
            tensor = tensor.to(floats)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), _CHUNK_BYTES):
            digest.update(flat[start : start + _CHUNK_BYTES].data)
    return digest.hexdigest()
