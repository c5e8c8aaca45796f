"""The linear layers of a language model in four bits (bitsandbytes)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from memtool.errors import ConfigError

UNIT = 32
"""Rows and columns that bitsandbytes packs together."""

PACKED_BYTES = 0.5 + 4 / 64
"""Of a number: four bits, and a scale in float32 for 64 of them."""


def require_bitsandbytes() -> None:
    """Raise ConfigError where the package is not installed."""
    # It warns of kernels that are faster, whoever asks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "backbone.quantise=4bit needs the package bitsandbytes",
            expected="it installed, or the weights as they are",
            remedy="pip install 'memtool[4bit]', or --set backbone.quantise=none",
        ) from error


def can_be_packed(weight: Tensor) -> bool:
    """Whether a matrix can be kept in four bits."""
    return all(size % UNIT == 0 for size in weight.shape)


def four_bits(linear: Any, dtype: torch.dtype) -> nn.Module:
    """A linear layer, or GPT-2's transposed one, with weights in four bits (nf4).

    It computes in `dtype`. On a GPU the weights are packed when it is moved there. A layer whose
    sizes are no multiples of `UNIT`, which bitsandbytes cannot pack on every CPU, stays as it is.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.data.t() if hasattr(linear, "nf") else linear.weight.data
    rows, wide = weight.shape
    if not can_be_packed(weight):
        plain: nn.Module = linear
        return plain
    packed: nn.Module = Linear4bit(
        wide, rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    packed.weight = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        packed.bias = linear.bias
    return packed.to(weight.device)
