"""Rank-1 atoms: what a row of kind "atoms" holds at one module of the layout.

A row of atoms is laid out like an adapter of rank r: at every module, row i of lora_A (r, d_in) is
the key of atom i and column i of lora_B (d_out, r) is its value. A memory reads them as one
matrix of keys and one of values over all tasks, `AtomBank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores.catalog import AdapterRecord
from memtool_stores.errors import IntegrityError, NotFoundError
from memtool_stores.space import Layout, Segment

KEY_SUFFIX = ".lora_A"
VALUE_SUFFIX = ".lora_B"


@dataclass(frozen=True, eq=False)
class AtomBank:
    """The n atoms of one module, in the order of their rows and ranks, pruned ones left out.

    `keys` is (n, d_in) and `values` (d_out, n), in the dtype of the layout (bfloat16: its bits as
    uint16). Of atom j, `owner[j]` is the place of its row in `view.atom_records`, `rank[j]` its
    index inside that row, `tasks[j]` the task of the row, and `scaling[j]` what multiplies it.
    """

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    owner: npt.NDArray[np.intp]
    rank: npt.NDArray[np.intp]
    tasks: tuple[Any, ...]
    scaling: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rank)


def modules_of(layout: Layout) -> tuple[str, ...]:
    """Names of the modules that have both a `.lora_A` and a `.lora_B`, in the order of the layout.

    Both must be matrices, (r, d_in) and (d_out, r) with one r; a module of another kind holds no
    atoms.
    """
    shapes = {segment.name: segment.shape for segment in layout.segments}
    names = (n.removesuffix(KEY_SUFFIX) for n in shapes if n.endswith(KEY_SUFFIX))
    return tuple(
        name
        for name in names
        if len(a := shapes[name + KEY_SUFFIX]) == 2
        and len(b := shapes.get(name + VALUE_SUFFIX, ())) == 2
        and a[0] == b[1]
    )


def segments_of(layout: Layout, module: str) -> tuple[Segment, Segment]:
    """The segments of a module: its A (r, d_in) and its B (d_out, r).

    Raises:
        NotFoundError: no module of that name holds atoms.
    """
    modules = modules_of(layout)
    if module not in modules:
        raise NotFoundError(
            f"no module {module!r} in the layout of this store",
            expected=f"one of {', '.join(modules)}" if modules else "a layout of LoRA matrices",
        )
    return layout.segment(module + KEY_SUFFIX), layout.segment(module + VALUE_SUFFIX)


def bank(
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    records: Sequence[AdapterRecord],
    module: str,
) -> AtomBank:
    """The atoms of `module` in t rows, of which these are A (t, r, d_in) and B (t, d_out, r).

    Raises:
        IntegrityError: a record has atoms pruned that the module does not have.
    """
    kept = np.ones(keys.shape[:2], dtype=bool)
    for place, record in enumerate(records):
        pruned = list(record.pruned.get(module, ()))
        if pruned and max(pruned) >= keys.shape[1]:
            raise IntegrityError(
                what="catalog",
                name=record.name,
                expected=f"{keys.shape[1]} atoms of {module}",
                found=f"atom {max(pruned)} pruned",
            )
        kept[place, pruned] = False
    owner, rank = np.nonzero(kept)
    owners = [records[place] for place in owner.tolist()]
    return AtomBank(
        keys[owner, rank],
        np.ascontiguousarray(values[owner, :, rank].T),
        owner,
        rank,
        tuple(record.task for record in owners),
        np.array([record.scaling for record in owners], dtype=np.float64),
    )
