"""`adapter_model.safetensors` of a PEFT directory: its names, its header, and what it adapts.

A module that memtool wrote holds the slices of a fused layer as blocks (see `peft_files`); here
they are stacked, and found again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool.adapters.layout import Site
from memtool.errors import CorruptError, DataError, MismatchError
from memtool.outside import parsed_json
from memtool.tensor_bytes import StoredArray
from memtool_stores.printable import shown

WEIGHTS_NAME = "adapter_model.safetensors"
DTYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
}
"""The number formats that a file may have: torch's name of each."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Array = npt.NDArray[Any]

_WRAPPER = re.compile(r"(^|(?<=\.))_orig_mod\.|^module\.|(?<=^base_model\.model\.)module\.")
"""What torch.compile, and training on several devices, leave in names."""

_ATTENTION = ".attn"
"""A module of this name that peft adapts itself is torch's attention, as that of CLIP."""

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.weight"
)
"""Between part and weight may stand what peft calls the adapter, as default."""


@dataclass(frozen=True)
class Note:
    """What `write_peft` leaves in the metadata: the layout, which zeros in B would hide."""

    sites: tuple[str, ...]
    rank: int
    alpha: float
    extra: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Module:
    """One adapted module of a file: its numbers, and the sites that they hold, one per group.

    `tensor` is the name of its A in the file.
    """

    name: str
    tensor: str
    a: Array
    b: Array
    sites: tuple[Site, ...]

    @property
    def rank(self) -> int:
        """Rank of each group."""
        return self.a.shape[0] // len(self.sites)


def tensor_name(module: str, part: str) -> str:
    """The name that peft gives to A or B of a module."""
    return f"base_model.model.{module}.lora_{part}.weight"


def place_of(name: str) -> tuple[str, str] | None:
    """The module and the part, A or B, that a tensor of this name is of; None for no such name."""
    match = _matched(name)
    if match is None:
        return None
    module = match["module"].replace(f"{_ATTENTION}.base_layer.", f"{_ATTENTION}.")
    return (f"{module}.in_proj" if module.endswith(_ATTENTION) else module, match["part"])


def called_by_peft(name: str) -> tuple[str, bool]:
    """What patterns of a configuration know the module of a tensor by; and whether it is an inner.

    Both layers of a torch.nn.MultiheadAttention go by the name of the whole, as peft adapts it; the
    inner one is its out_proj.
    """
    match = _matched(name)
    called, inner, _ = ("", "", "") if match is None else match["module"].partition(".base_layer.")
    return called, bool(inner)


def _matched(name: str) -> re.Match[str] | None:
    while (plain := _WRAPPER.sub("", name)) != name:
        name = plain
    return _TENSOR_NAME.fullmatch(name)


def sites_by_module(sites: Sequence[Site]) -> dict[str, tuple[Site, ...]]:
    """The sites of every module, ascending by row. Raises MismatchError when they overlap."""
    modules: dict[str, list[Site]] = {}
    for site in sites:
        modules.setdefault(site.module, []).append(site)
    for module, members in modules.items():
        members.sort(key=lambda site: site.first_row)
        for before, after in pairwise(members):
            if before.first_row + before.out_features > after.first_row:
                raise MismatchError(
                    f"{before.name} and {after.name} adapt the same rows of {module}",
                    expected="the whole layer, or slices of it that do not overlap",
                )
    return {module: tuple(members) for module, members in modules.items()}


def block_structured(sites: Sequence[Site], parts: Sequence[Array]) -> Array:
    """B (module_rows, groups · r) with the B of every site in its own rows and ranks."""
    rank = parts[0].shape[1]
    whole = np.zeros((sites[0].module_rows, rank * len(sites)), parts[0].dtype)
    for group, (site, part) in enumerate(zip(sites, parts, strict=True)):
        rows = slice(site.first_row, site.first_row + site.out_features)
        whole[rows, group * rank : (group + 1) * rank] = part
    return whole


def header_bytes(arrays: Mapping[str, Array], code: str, metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, always the same for the same input, padded to whole 8 bytes.

    `code` is the number format of all arrays, one of `DTYPES`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(arrays):
        end = offset + arrays[name].nbytes
        entries[name] = {
            "dtype": code,
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def parsed_header(header: bytes, where: str) -> dict[str, Any]:
    """The entries of a header, by tensor; `__metadata__` is one of them where it is there.

    Raises CorruptError for what is no header of matrices, or of kernels with four axes, that lie
    one after another.
    """
    entries = parsed_json(header, where)
    places = []
    for name, entry in entries.items():
        if name == "__metadata__":
            if not isinstance(entry, dict):
                raise CorruptError(f"{where}: __metadata__ is {shown(entry)}")
            continue
        match entry:
            case {
                "dtype": str(dtype),
                "shape": [*axes],
                "data_offsets": [int(begin), int(end)],
            } if (
                dtype in DTYPES
                and len(axes) in (2, 4)
                and all(isinstance(axis, int) and axis >= 0 for axis in axes)
            ):
                places.append((begin, end, math.prod(axes) * ITEM_BYTES[dtype], name))
            case _:
                raise CorruptError(f"{where}: {shown(name)} is {shown(entry)}")
    reached = 0
    for begin, end, size, name in sorted(places):
        if (begin, end) != (reached, reached + size):
            raise CorruptError(f"{where}: {shown(name)} does not begin where the last one ends")
        reached = end
    return entries


def note_in(entries: Mapping[str, Any], where: str) -> Note | None:
    """What `write_peft` left in the metadata; None for a file written by others."""
    metadata = entries.get("__metadata__")
    text = metadata.get("memtool") if isinstance(metadata, dict) else None
    if text is None:
        return None
    if isinstance(text, str):
        match parsed_json(text, f"{where}: the memtool metadata"):
            case {
                "sites": [*sites],
                "rank": int(rank),
                "alpha": int(alpha) | float(alpha),
                "extra": dict(extra),
            } if (
                all(isinstance(site, str) for site in sites)
                and len(set(sites)) == len(sites)
                and rank > 0
                and 0 < alpha < 1e300
            ):
                return Note(tuple(sites), rank, float(alpha), extra)
    raise CorruptError(
        f"{where}: the memtool metadata cannot be read: {shown(text)}",
        expected="sites, rank, alpha and extra, as memtool writes them",
    )


OF_ANOTHER = "--base, --preset or --set backbone.name, for the model that it was made for"
"""What helps where layers of a backbone do not fit."""


def adapted_modules(
    tensors: Mapping[str, StoredArray], available: Sequence[Site], note: Note | None, where: str
) -> list[Module]:
    """The adapted modules of a file, each with the sites that its B holds."""
    parts: dict[str, dict[str, Array]] = {}
    names: dict[str, str] = {}
    called = {match["adapter"] for name in tensors if (match := _TENSOR_NAME.search(name))}
    if len(called) > 1:
        raise MismatchError(
            f"{where} holds tensors of {len(called)} adapters", expected="one adapter in a folder"
        )
    for name, tensor in tensors.items():
        place = place_of(name)
        if place is None:
            raise MismatchError(
                f"{where} holds {shown(name)}, which is no part of a plain LoRA",
                expected="names base_model.model.<module>.lora_A.weight and .lora_B.weight",
            )
        if tensor.ndim not in (2, 4):
            raise MismatchError(
                f"{where}: {shown(name)} has shape {tuple(tensor.shape)}",
                expected="two axes, as LoRA of linear layers, or four, as of convolutions",
            )
        if tensor.dtype not in DTYPES.values():
            raise MismatchError(
                f"{where}: {shown(name)} is of type {tensor.dtype}",
                expected="floats of 16 to 64 bits",
            )
        if not np.isfinite(tensor.numbers).all():
            raise DataError(
                f"{where}: {shown(name)} has numbers that are not finite (NaN or infinity)"
            )
        module, part = place
        if part in parts.setdefault(module, {}):
            raise CorruptError(f"{where} holds lora_{part} of {shown(module)} twice")
        parts[module][part] = tensor.numbers
        if part == "A":
            names[module] = name
    if not parts:
        raise CorruptError(f"{where} holds no tensors", expected="at least one adapted layer")
    known = sites_by_module([site for site in available if site.slice])
    whole = {site.module: site for site in available if not site.slice}
    modules: list[Module] = []
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise CorruptError(f"{where}: {shown(name)} has lora_{next(iter(pair))} only")
        if name not in known and name not in whole:
            raise MismatchError(
                f"{where} adapts {shown(name)}, and the backbone has no such layer to adapt",
                expected=f"layers such as {', '.join(sorted({*known, *whole})[:4])}",
                remedy=OF_ANOTHER,
            )
        slices = known.get(name, ())
        site = whole.get(name) or slices[0].whole
        rank = pair["A"].shape[0]
        if rank < 1 or rank % site.groups:
            some = "rank" if site.groups == 1 else f"a rank in {site.groups} groups"
            raise _misfit(where, name, "A", pair["A"], f"({some}, {site.in_features})")
        a, b = site.shapes(rank)
        if pair["A"].shape != a:
            inside = ", ".join(map(str, ("rank", *a[1:])))
            raise _misfit(where, name, "A", pair["A"], f"({inside})")
        if pair["B"].shape != b:
            raise _misfit(where, name, "B", pair["B"], str(b))
        pair = {part: array.reshape(len(array), -1) for part, array in pair.items()}
        sites = _sites_held(name, pair["B"], slices, note, where) or (site,)
        modules.append(Module(name, names[name], pair["A"], pair["B"], sites))
    if note is not None:
        held = {site.name for module in modules for site in module.sites}
        ranks = {module.rank for module in modules}
        if held != set(note.sites) or ranks != {note.rank}:
            raise CorruptError(
                f"{where}: the tensors are not what the metadata says",
                expected=f"rank {note.rank} on {', '.join(note.sites[:4])} ...",
            )
    return modules


def _misfit(where: str, module: str, part: str, array: Array, expected: str) -> MismatchError:
    return MismatchError(
        f"{where}: lora_{part} of {module} has shape {array.shape}",
        expected=f"{expected} on this backbone",
        remedy=OF_ANOTHER,
    )


def _sites_held(
    module: str, b: Array, slices: Sequence[Site], note: Note | None, where: str
) -> tuple[Site, ...]:
    """The slices that the groups of B's columns belong to, in row order; () for the whole module.

    The note says it; without one, B does: each column may touch the rows of one slice only, and
    the slices that are touched at all must own equal, consecutive groups of columns.
    """
    if note is not None:
        held = tuple(site for site in slices if site.name in note.sites)
        if held and not _has_blocks(b, held):
            raise CorruptError(
                f"{where}: B of {module} is not zero outside its slices, as the metadata says"
            )
        return held
    touched = tuple(
        site for site in slices if b[site.first_row : site.first_row + site.out_features].any()
    )
    return touched if touched and _has_blocks(b, touched) else ()


def _has_blocks(b: Array, sites: Sequence[Site]) -> bool:
    """Whether B (module_rows, R) has one group of columns a site, and is +0 outside its rows."""
    if b.shape[1] % len(sites) != 0:
        return False
    rank = b.shape[1] // len(sites)
    outside = np.ones(b.shape, dtype=np.bool_)
    for group, site in enumerate(sites):
        rows = slice(site.first_row, site.first_row + site.out_features)
        outside[rows, group * rank : (group + 1) * rank] = False
    rest = b[outside]
    # A negative zero would come back as a positive one, and the file would not be the same.
    return not rest.any() and not bool(np.signbit(rest).any())
