"""Which linear maps carry an adapter, and where each number of it lies in the flat value.

A value is one adapter as a vector: for every site in block order its A (rank, d_in), then its
B (d_out, rank), row-major. This is θ = w¹ ⊕ w² ⊕ … of the modulation paper.

Of a convolution d_in is channels · height · width of its kernel, and A, B are those of PEFT: A a
convolution to `rank` channels, (rank, channels, height, width), B one of 1 × 1 with the groups of
the layer, (d_out, rank / groups, 1, 1). Group g of the output is made of group g of the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    where the slice begins among the `module_rows` output rows of the module. A convolution has a
    `kernel` (height, width), which `in_features` counts, and perhaps several `groups`.
    """

    block: int
    module: str
    slice: str
    in_features: int
    out_features: int
    first_row: int
    module_rows: int
    kernel: tuple[int, int] | None = None
    groups: int = 1

    @property
    def channels(self) -> int:
        """What comes in at each place of a kernel."""
        return self.in_features // math.prod(self.kernel or (1,))

    @property
    def name(self) -> str:
        """`"blocks.0.attn.qkv[q]"`, or the module's own name for a whole layer."""
        return f"{self.module}[{self.slice}]" if self.slice else self.module

    @property
    def whole(self) -> Site:
        """The site of the whole module that this is a slice of."""
        rows = self.module_rows
        return replace(self, slice="", out_features=rows, first_row=0)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B as PEFT has them. Raises MismatchError for a rank in no groups."""
        _require_multiple((self,), rank)
        a, b = (rank, self.in_features), (self.out_features, rank // self.groups)
        if self.kernel is None:
            return a, b
        return (rank, self.channels, *self.kernel), (*b, 1, 1)

    def ranks(self, own: int, rank: int) -> list[int]:
        """Where `own` ranks lie among `rank` ones: the first of each group."""
        each, room = own // self.groups, rank // self.groups
        return [group * room + one for group in range(self.groups) for one in range(each)]


@dataclass(frozen=True)
class Segment:
    """One tensor of the flat value: name, shape, and offset in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as a matrix: a row for each of the first axis."""
        return self.shape[0], self.numel // self.shape[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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
        _require_multiple(self.sites, self.rank)
        for site in self.sites:
            for suffix, shape in zip(("lora_A", "lora_B"), site.shapes(self.rank), strict=True):
                segments.append(Segment(f"{site.name}.{suffix}", shape, offset))
                offset += segments[-1].numel
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
        """The flat value (numel,) of matrices named as `segments`; bit-exact."""
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
            if tuple(tensor.shape) != segment.matrix:
                raise MismatchError(
                    f"{segment.name} has shape {tuple(tensor.shape)}", expected=str(segment.matrix)
                )
            parts.append(tensor.reshape(-1))
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        import torch

        return torch.cat(parts)

    def unflatten(self, value: Numbers) -> dict[str, Numbers]:
        """Views of a flat value (..., numel), each of shape (..., *segment.matrix)."""
        if value.shape[-1] != self.numel:
            raise MismatchError(
                f"a value of {value.shape[-1]} numbers",
                expected=f"{self.numel} numbers for this layout",
            )
        lead = value.shape[:-1]
        return {
            s.name: value[..., s.offset : s.offset + s.numel].reshape(*lead, *s.matrix)
            for s in self.segments
        }


def _require_multiple(sites: Sequence[Site], rank: int) -> None:
    """Raise MismatchError for a rank that the groups of some site do not divide.

    It names the first of those, and the least rank that fits all, where that is no wider than they.
    """
    misfit = next((site for site in sites if rank % site.groups), None)
    if misfit is not None:
        fits = math.lcm(*(site.groups for site in sites))
        sane = fits <= max(site.out_features for site in sites)
        raise MismatchError(
            f"{misfit.name} is a convolution of {misfit.groups} groups, and the rank is {rank}",
            expected=f"a multiple of {fits}, as PEFT has it",
            remedy=(f"--set adapter.rank={fits}, or " if sane else "")
            + "backbone.targets without this layer",
        )


def sites_in_block_order(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites sorted by block, then by the order given."""
    return tuple(sorted(sites, key=lambda site: site.block))


_IN_BLOCK = re.compile(r"(?P<block>.*?\.\d+)(\.|$)")
_SLICE = re.compile(r"(?P<module>.+)\[(?P<slice>[a-z]+)\]")
_THIRDS = ("attn.qkv", "attn.in_proj", "attn.c_attn")
"""How the fused layers are called whose slices are thirds, in any model."""


def block_in(name: str) -> str | None:
    """The block that a site or segment is named in, `"blocks.4"`; None where it has no number."""
    found = _IN_BLOCK.match(name)
    return None if found is None else found["block"]


def sites_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[Site, ...]:
    """The sites whose A and B are these segments: (name, shape) in the order of a layout.

    The inverse of `Layout.segments` for whole layers and for slices that are thirds, in blocks that
    are numbered in their names; of a model with stages of blocks, the stages are counted. Raises
    MismatchError for other segments.
    """
    given = list(shapes)
    sites: list[Site] = []
    known = {block_in(name) or "" for name, _ in given}
    alone = len({block.rpartition(".")[0] for block in known}) == 1
    blocks: dict[str, int] = {}
    for (name, a), (other, b) in zip(given[::2], given[1::2], strict=False):
        site = name.removesuffix(".lora_A")
        block = block_in(site)
        if (name, other) != (f"{site}.lora_A", f"{site}.lora_B") or block is None:
            raise MismatchError(f"segments {name!r} and {other!r} of no numbered block")
        number = int(block.rpartition(".")[2]) if alone else blocks.setdefault(block, len(blocks))
        rows, part = b[0], _SLICE.fullmatch(site)
        if part is None:
            kernel = (a[2], a[3]) if len(a) == 4 else None
            wide, groups = math.prod(a[1:]), a[0] // b[1]
            sites.append(Site(number, site, "", wide, rows, 0, rows, kernel, groups))
        elif part["slice"] not in SLICES or not part["module"].endswith(_THIRDS):
            raise MismatchError(f"segments of {site!r}, whose place in its layer is not told")
        else:
            first = SLICES.index(part["slice"]) * rows
            sites.append(Site(number, part["module"], part["slice"], a[1], rows, first, 3 * rows))
    return tuple(sites)
