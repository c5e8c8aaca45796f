"""For tests of stores and of what is built on them: small spaces, and an oracle in memory.

The oracle keeps every version as plain Python values, in the most obvious way. Whatever is done to
a store and to the oracle alike, `assert_same` must hold for every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from memtool_stores.space import Backbone, Layout, Segment, Space
from memtool_stores.transaction import Transaction
from memtool_stores.tree import Array, numpy_dtype
from memtool_stores.view import MemoryView


def small_space(dtype: str = "float32") -> Space:
    """A space whose values have 22 elements: one A (2, 5) and one B (6, 2)."""
    segments = (
        Segment("blocks.0.attn.qkv[q].lora_A", (2, 5), 0),
        Segment("blocks.0.attn.qkv[q].lora_B", (6, 2), 10),
    )
    return Space(
        Backbone("tiny", "main", "5f" * 32),
        Layout(segments, dtype, rank=2, alpha=4.0, targets=("q",)),
    )


def some_values(space: Space, seed: int) -> Array:
    """Any bits but not-a-number, (numel,), always the same ones for a seed."""
    generator = np.random.default_rng(seed)
    dtype = numpy_dtype(space.layout)
    if space.layout.dtype == "bfloat16":
        return generator.integers(0, 2**16, space.numel, dtype=np.uint16).astype(dtype)
    return generator.standard_normal(space.numel).astype(dtype)


@dataclass(frozen=True)
class OracleAdapter:
    """One adapter as it was given, and its key, (L, d_k), when it has one."""

    values: Array
    meta: Mapping[str, Any]
    key: Array | None = None


@dataclass(frozen=True)
class OracleVersion:
    """What one version must hold, adapters by name in the order they were added."""

    message: str
    adapters: Mapping[str, OracleAdapter] = field(default_factory=dict)
    keys_set: bool = False
    blobs: Mapping[str, bytes] = field(default_factory=dict)

    def add(self, name: str, values: Array, meta: Mapping[str, Any]) -> OracleVersion:
        """With one more adapter."""
        return replace(self, adapters={**self.adapters, name: OracleAdapter(values, meta)})

    def remove(self, name: str) -> OracleVersion:
        """Without that adapter."""
        return replace(self, adapters={k: v for k, v in self.adapters.items() if k != name})

    def set_keys(self, keys: Array) -> OracleVersion:
        """With keys (L, T, d_k) for all its adapters."""
        adapters = {
            name: replace(adapter, key=keys[:, t])
            for t, (name, adapter) in enumerate(self.adapters.items())
        }
        return replace(self, adapters=adapters, keys_set=True)

    def put_blob(self, name: str, data: bytes) -> OracleVersion:
        """With that blob."""
        return replace(self, blobs={**self.blobs, name: data})


def assert_same(view: MemoryView, oracle: OracleVersion) -> None:
    """The view gives exactly what the oracle has: names, metas, bits of values, keys, blobs."""
    assert view.message == oracle.message
    assert len(view) == len(oracle.adapters)
    assert [record.name for record in view.adapters] == list(oracle.adapters)
    values = view.values()
    for row, (name, adapter) in zip(values, oracle.adapters.items(), strict=True):
        assert row.tobytes() == adapter.values.tobytes()
        assert view.value(name).tobytes() == adapter.values.tobytes()
        assert dict(view.get(name).meta) == dict(adapter.meta)
    keys = view.keys()
    with_key = [adapter.key for adapter in oracle.adapters.values() if adapter.key is not None]
    if not oracle.keys_set:
        assert keys is None
    else:
        assert keys is not None
        assert keys.shape[1] == len(with_key)
        for t, key in enumerate(with_key):
            assert keys[:, t].tobytes() == key.tobytes()
    assert {name: view.blob(name) for name in view.blobs()} == dict(oracle.blobs)


def fill(transaction: Transaction, space: Space, name: str, seed: int) -> str:
    """Add an adapter of `some_values`; its id."""
    return transaction.add(name, some_values(space, seed), {"task": seed})
