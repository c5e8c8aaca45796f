"""The values of stored adapters, whatever their layouts: what a method computes with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import memtool_stores
from memtool.adapters.layout import Layout, Site
from memtool.adapters.peft_files import parse_peft
from memtool.adapters.resident import ResidentValues, too_small
from memtool.adapters.stock import OneAdapter, united
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError
from memtool.methods.export import config_blob
from memtool.tensor_bytes import read_arrays


def stored_adapter(
    view: memtool_stores.MemoryView,
    record: memtool_stores.AdapterRecord,
    layout: Layout,
    sites: Sequence[Site],
) -> OneAdapter:
    """An adapter of a store; `layout` is that of rows, `sites` all that the model offers."""
    if not record.ragged:
        value = torch.from_numpy(view.value(record.id).copy())
        return OneAdapter(layout, value, float(record.scaling))
    where = f"adapter {record.name!r} in memory"
    config = read_arrays(*config_blob(view, record), config="uint8 c")
    found = parse_peft(view.export(record.id), config["config"].bits.tobytes(), sites, where)
    return OneAdapter(found.layout, found.value.float(), found.scaling)


def values_of(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    layout: Layout,
    sites: Sequence[Site],
    resident: int | None = None,
) -> AdapterValues:
    """These adapters stacked, on the CPU: exact also where their layouts differ, as in `united`.

    `layout` and `sites` as in `stored_adapter`; at least one record. Of more than so many
    `resident` bytes some are held at a time, and the others read when they are used. Raises
    ConfigError where not even one is, or where their layouts differ.
    """
    scaling = torch.tensor([record.scaling for record in records], dtype=torch.float32)
    nbytes = view.space.layout.nbytes
    few = resident is not None and resident // nbytes < len(records)
    if ragged := next((record for record in records if record.ragged), None):
        if few:
            raise ConfigError(
                f"engine.resident {resident} with adapter {ragged.name!r}, which has a layout of "
                "its own",
                expected="adapters of the layout of the store",
                remedy="--set engine.resident=none",
            )
        return united([stored_adapter(view, record, layout, sites) for record in records], sites)

    def read(numbers: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(view.values([records[number].id for number in numbers]).copy())

    if few and resident is not None:
        if resident < nbytes:
            raise too_small(0, len(records), 1, nbytes)
        return ResidentValues(layout, scaling, resident // nbytes, read)
    return AdapterValues.from_flat(read(range(len(records))), layout, scaling)
