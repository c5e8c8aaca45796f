"""What changed between two versions: adapters, keys (as angles), blobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from memtool_stores.catalog import AdapterRecord
from memtool_stores.view import HEADER_PREFIX, MemoryView

Records: TypeAlias = tuple[AdapterRecord, ...]


@dataclass(frozen=True)
class Diff:
    """From version `a` to version `b`.

    `changed` are the adapters of both (as they are in `b`) of which something else is said.
    `key_drift_degrees` gives, by name, the angle between the old and the new key of an adapter
    that has one in both, averaged over the layers; empty when the keys have other widths.
    `changed_blobs` were added, replaced or deleted. `added_atoms` and `removed_atoms` are rows of
    atoms; `changed_atoms` are those of both of which something else is said, and `pruned_atoms`
    counts, by name, how many of their atoms were taken out.
    """

    a: str
    b: str
    added: tuple[AdapterRecord, ...]
    removed: tuple[AdapterRecord, ...]
    changed: tuple[AdapterRecord, ...]
    key_drift_degrees: Mapping[str, float]
    changed_blobs: tuple[str, ...]
    added_atoms: tuple[AdapterRecord, ...] = ()
    removed_atoms: tuple[AdapterRecord, ...] = ()
    changed_atoms: tuple[AdapterRecord, ...] = ()
    pruned_atoms: Mapping[str, int] = field(default_factory=dict)


def diff(a: MemoryView, b: MemoryView) -> Diff:
    """Everything that differs from version `a` to version `b`."""
    added, removed, changed = _rows(a.adapters, b.adapters)
    added_atoms, removed_atoms, changed_atoms = _rows(a.atom_records, b.atom_records)
    atoms_before = {record.id: record for record in a.atom_records}
    pruned = {
        record.name: _pruned_count(record) - _pruned_count(atoms_before[record.id])
        for record in changed_atoms
    }
    old, new = a.blob_hashes, b.blob_hashes
    blobs = {
        name
        for name in old.keys() | new.keys()
        if old.get(name) != new.get(name) and not name.startswith(HEADER_PREFIX)
    }
    return Diff(
        a.version,
        b.version,
        added,
        removed,
        changed,
        _key_drift(a, b),
        tuple(sorted(blobs)),
        added_atoms,
        removed_atoms,
        changed_atoms,
        {name: count for name, count in pruned.items() if count},
    )


def _rows(a: Records, b: Records) -> tuple[Records, Records, Records]:
    """The rows only of `b`, those only of `a`, and those of both that are not alike."""
    before = {record.id: record for record in a}
    after = {record.id for record in b}
    return (
        tuple(r for r in b if r.id not in before),
        tuple(r for r in a if r.id not in after),
        tuple(r for r in b if r.id in before and r != before[r.id]),
    )


def _pruned_count(record: AdapterRecord) -> int:
    return sum(map(len, record.pruned.values()))


def _key_drift(a: MemoryView, b: MemoryView) -> dict[str, float]:
    old, new = a.keys(), b.keys()
    if old is None or new is None or (old.shape[0], old.shape[2]) != (new.shape[0], new.shape[2]):
        return {}
    at = {record.id: t for t, record in enumerate(a.adapters[: old.shape[1]])}
    pairs = [
        (record.name, at[record.id], t)
        for t, record in enumerate(b.adapters[: new.shape[1]])
        if record.id in at
    ]
    drift = {}
    for name, i, j in pairs:
        angles = _angles_degrees(old[:, i].astype(np.float64), new[:, j].astype(np.float64))
        drift[name] = float(angles.mean())
    return drift


def _angles_degrees(
    x: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    y: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Angle between the rows of x and y, (L, d) each; 0 for equal rows, 90 where one is zero.

    2 atan2(|x/|x| - y/|y||, |x/|x| + y/|y||) keeps its precision where arccos loses it.
    """
    norm_x = np.linalg.norm(x, axis=1, keepdims=True)
    norm_y = np.linalg.norm(y, axis=1, keepdims=True)
    x = x / np.where(norm_x == 0, 1, norm_x)
    y = y / np.where(norm_y == 0, 1, norm_y)
    apart = np.linalg.norm(x - y, axis=1)
    along = np.linalg.norm(x + y, axis=1)
    return np.degrees(2 * np.arctan2(apart, along))
