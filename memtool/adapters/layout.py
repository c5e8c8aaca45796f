"""Which linear maps carry an adapter, and where each number of it lies in the flat value.

A value is one adapter as a vector: for every site in block order its A (rank, d_in), then its
B (d_out, rank), row-major. This is θ = w¹ ⊕ w² ⊕ … of the modulation paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from memtool.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

Numbers = TypeVar("Numbers", "Tensor", npt.NDArray[Any])
"""Of torch or of numpy: what is done with a flat value is the same."""

MOST_PADDING = 64
"""Times its own numbers that what is padded to one rank, or to one set of sites, may take."""

SLICES = "qkv"
"""The slices of a fused layer of an image model: thirds of its output rows, in this order."""


@dataclass(frozen=True)
class Site:
    """One adapted linear map: a whole linear layer, or a slice of the output rows of a fused one.

    `slice` is "" for a whole layer, else its name ("q", "k", "v", "gate", "up"); `first_row` is
    where the slice begins among the `module_rows` output rows of the module.
    """

    block: int
    module: str
    slice: str
    in_features: int
    out_features: int
    first_row: int
    module_rows: int

    @property
    def name(self) -> str:
        """`"blocks.0.attn.qkv[q]"`, or the module's own name for a whole layer."""
        return f"{self.module}[{self.slice}]" if self.slice else self.module

    @property
    def whole(self) -> Site:
        """The site of the whole module that this is a slice of."""
        rows = self.module_rows
        return Site(self.block, self.module, "", self.in_features, rows, 0, rows)


@dataclass(frozen=True)
class Segment:
    """One tensor of the flat value: name, shape, and offset in elements."""

    name: str
    shape: tuple[int, int]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """The flat order of one adapter of a given rank over the given sites (in block order)."""

    sites: tuple[Site, ...]
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MismatchError(f"adapter rank {self.rank}", expected="a rank of at least 1")
        if not self.sites:
            raise MismatchError("an adapter layout without sites", expected="at least one site")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """A and B of every site with their offsets; names end in `.lora_A` and `.lora_B`."""
        segments: list[Segment] = []
        offset = 0
        for site in self.sites:
            for suffix, shape in (
                ("lora_A", (self.rank, site.in_features)),
                ("lora_B", (site.out_features, self.rank)),
            ):
                segments.append(Segment(f"{site.name}.{suffix}", shape, offset))
                offset += shape[0] * shape[1]
        return tuple(segments)

    @property
    def numel(self) -> int:
        """Length of the flat value."""
        last = self.segments[-1]
        return last.offset + last.numel

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have a site, ascending."""
        return tuple(sorted({site.block for site in self.sites}))

    def flatten(self, tensors: Mapping[str, Numbers]) -> Numbers:
        """The flat value (numel,) of tensors named as `segments`; bit-exact."""
        names = {segment.name for segment in self.segments}
        if names != set(tensors):
            missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names)
            raise MismatchError(
                f"tensors do not fit the layout: missing {missing[:3]}, not known {extra[:3]}",
                expected=f"{len(names)} tensors for rank {self.rank}",
            )
        parts: list[Numbers] = []
        for segment in self.segments:
            tensor = tensors[segment.name]
            if tuple(tensor.shape) != segment.shape:
                raise MismatchError(
                    f"{segment.name} has shape {tuple(tensor.shape)}", expected=str(segment.shape)
                )
            parts.append(tensor.reshape(-1))
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        import torch

        return torch.cat(parts)

    def unflatten(self, value: Numbers) -> dict[str, Numbers]:
        """Views of a flat value (..., numel), each of shape (..., *segment.shape)."""
        if value.shape[-1] != self.numel:
            raise MismatchError(
                f"a value of {value.shape[-1]} numbers",
                expected=f"{self.numel} numbers for this layout",
            )
        lead = value.shape[:-1]
        return {
            s.name: value[..., s.offset : s.offset + s.numel].reshape(*lead, *s.shape)
            for s in self.segments
        }


def sites_in_block_order(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites sorted by block, then by the order given."""
    return tuple(sorted(sites, key=lambda site: site.block))


_IN_BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.")
_SLICE = re.compile(r"(?P<module>.+)\[(?P<slice>[a-z]+)\]")
_THIRDS = ("attn.qkv", "attn.in_proj", "attn.c_attn")
"""How the fused layers are called whose slices are thirds, in any model."""


def sites_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[Site, ...]:
    """The sites whose A and B are these segments: (name, shape) in the order of a layout.

    The inverse of `Layout.segments` for whole layers and for slices that are thirds, in blocks that
    are numbered in their names. Raises MismatchError for other segments.
    """
    given = list(shapes)
    sites: list[Site] = []
    blocks: dict[str, int] = {}
    for (name, a), (other, b) in zip(given[::2], given[1::2], strict=False):
        site = name.removesuffix(".lora_A")
        block = _IN_BLOCK.match(site)
        if (name, other) != (f"{site}.lora_A", f"{site}.lora_B") or block is None:
            raise MismatchError(f"segments {name!r} and {other!r} of no numbered block")
        number = blocks.setdefault(block["block"], len(blocks))
        rows, part = b[0], _SLICE.fullmatch(site)
        if part is None:
            sites.append(Site(number, site, "", a[1], rows, 0, rows))
        elif part["slice"] not in SLICES or not part["module"].endswith(_THIRDS):
            raise MismatchError(f"segments of {site!r}, whose place in its layer is not told")
        else:
            first = SLICES.index(part["slice"]) * rows
            sites.append(Site(number, part["module"], part["slice"], a[1], rows, first, 3 * rows))
    return tuple(sites)
