"""For tests of stores and of what is built on them: small spaces, an oracle, and a contract.

The oracle keeps every version as plain Python values, in the most obvious way. Whatever is done to
a store and to the oracle alike, `assert_same` must hold for every version.

The contract is what a store must do wherever it lies. `CONTRACT` holds its checks, each a function
of a url at which nothing is yet; a test runs all of them on directories, another on buckets:

    for check in CONTRACT:
        check(new_url())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from memtool_stores.atoms import segments_of
from memtool_stores.errors import (
    AlreadyExistsError,
    ConflictError,
    MemtoolError,
    NotFoundError,
    SchemaError,
    SpaceMismatchError,
)
from memtool_stores.space import Backbone, Layout, Segment, Space
from memtool_stores.store import MemoryStore
from memtool_stores.tensorfile import write_header
from memtool_stores.transaction import Transaction
from memtool_stores.tree import Array, numpy_dtype, sha256
from memtool_stores.view import MemoryView

MODULE = "blocks.0.attn.qkv[q]"
"""The one module of `small_space`."""


def small_space(dtype: str = "float32") -> Space:
    """A space whose values have 22 elements: one A (2, 5) and one B (6, 2)."""
    segments = (
        Segment(f"{MODULE}.lora_A", (2, 5), 0),
        Segment(f"{MODULE}.lora_B", (6, 2), 10),
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


def ragged_file(seed: int) -> bytes:
    """A safetensors file of no layout of ours: its tensors have two dtypes; always the same."""
    generator = np.random.default_rng(seed)
    rank = 1 + seed % 3
    entries = {
        "A": {"dtype": "F64", "shape": [rank, 3], "data_offsets": [0, 24 * rank]},
        "B": {"dtype": "F16", "shape": [4, rank], "data_offsets": [24 * rank, 32 * rank]},
    }
    text = json.dumps({"__metadata__": {"seed": str(seed % 2)}, **entries}).encode()
    return len(text).to_bytes(8, "little") + text + generator.bytes(32 * rank)


def fill(transaction: Transaction, space: Space, name: str, seed: int) -> str:
    """Add an adapter of `some_values`; its id."""
    return transaction.add(name, some_values(space, seed), {"task": seed})


def file_data(file: bytes) -> bytes:
    """The data section of a safetensors file."""
    return file[8 + int.from_bytes(file[:8], "little") :]


# The oracle


@dataclass(frozen=True)
class OracleAdapter:
    """One adapter as it was given, and its key, (L, d_k), when it has one.

    A ragged one has its `file`, whose data section are its values, uint8.
    """

    values: Array
    meta: Mapping[str, Any]
    key: Array | None = None
    file: bytes | None = None


@dataclass(frozen=True)
class OracleAtoms:
    """The atoms of one task as they were given, and the pairs (module, rank) taken out of them."""

    values: Array
    meta: Mapping[str, Any]
    pruned: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class OracleVersion:
    """What one version must hold, adapters and atoms by name in the order they were added.

    `removed` are the values of rows that are out of the memory, but not purged.
    """

    message: str
    adapters: Mapping[str, OracleAdapter] = field(default_factory=dict)
    keys_set: bool = False
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    atoms: Mapping[str, OracleAtoms] = field(default_factory=dict)
    removed: Mapping[str, Array] = field(default_factory=dict)

    def add(self, name: str, values: Array, meta: Mapping[str, Any]) -> OracleVersion:
        """With one more adapter."""
        return replace(self, adapters={**self.adapters, name: OracleAdapter(values, meta)})

    def add_ragged(self, name: str, file: bytes, meta: Mapping[str, Any]) -> OracleVersion:
        """With one more ragged adapter."""
        values = np.frombuffer(file_data(file), np.uint8)
        said = {"file_sha256": sha256(file), **meta}
        return replace(
            self, adapters={**self.adapters, name: OracleAdapter(values, said, file=file)}
        )

    def add_atoms(self, name: str, values: Array, meta: Mapping[str, Any]) -> OracleVersion:
        """With the atoms of one more task."""
        return replace(self, atoms={**self.atoms, name: OracleAtoms(values, meta)})

    def prune(self, name: str, module: str, ranks: list[int]) -> OracleVersion:
        """With these atoms of a module taken out."""
        before = self.atoms[name]
        after = replace(before, pruned=before.pruned | {(module, rank) for rank in ranks})
        return replace(self, atoms={**self.atoms, name: after})

    def remove(self, name: str) -> OracleVersion:
        """Without that adapter, or those atoms; the row is still there."""
        of_adapter = self.adapters.get(name)
        values = self.atoms[name].values if of_adapter is None else of_adapter.values
        return replace(self._without(name), removed={**self.removed, name: values})

    def purge(self, name: str) -> OracleVersion:
        """Without that adapter, those atoms, or that removed row, and without its bytes."""
        return self._without(name)

    def _without(self, name: str) -> OracleVersion:
        return replace(
            self,
            adapters={k: v for k, v in self.adapters.items() if k != name},
            atoms={k: v for k, v in self.atoms.items() if k != name},
            removed={k: v for k, v in self.removed.items() if k != name},
        )

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

    def row_hashes(self) -> set[str]:
        """SHA-256 of every row whose bytes this version holds."""
        adapters = [adapter.values for adapter in self.adapters.values()]
        atoms = [atoms.values for atoms in self.atoms.values()]
        return {sha256(values) for values in (*adapters, *atoms, *self.removed.values())}


def assert_same(view: MemoryView, oracle: OracleVersion) -> None:
    """The view gives exactly what the oracle has: names, metas, values to the bit, keys, blobs."""
    assert view.message == oracle.message
    assert len(view) == len(oracle.adapters)
    assert [record.name for record in view.adapters] == list(oracle.adapters)
    for name, adapter in oracle.adapters.items():
        assert view.value(name).tobytes() == adapter.values.tobytes()
        assert dict(view.get(name).meta) == dict(adapter.meta)
        assert view.get(name).ragged == (adapter.file is not None)
        if adapter.file is not None:
            assert view.export(name) == adapter.file
    _assert_same_values(view, oracle)
    _assert_same_atoms(view, oracle)
    for name in oracle.removed:
        with refused(NotFoundError):
            view.get(name)
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


def _assert_same_values(view: MemoryView, oracle: OracleVersion) -> None:
    regular = {name: a.values for name, a in oracle.adapters.items() if a.file is None}
    values = view.values(list(regular))
    if len(regular) == len(oracle.adapters):
        assert view.values().tobytes() == values.tobytes()
    else:
        for ask in (view.values, lambda: view.segment(view.space.layout.segments[0].name)):
            with refused(SpaceMismatchError, "ragged"):
                ask()
    for row, expected in zip(values, regular.values(), strict=True):
        assert row.tobytes() == expected.tobytes()


def _assert_same_atoms(view: MemoryView, oracle: OracleVersion) -> None:
    assert [record.name for record in view.atom_records] == list(oracle.atoms)
    for name, atoms in oracle.atoms.items():
        assert view.value(name).tobytes() == atoms.values.tobytes()
        assert dict(view.get(name).meta) == dict(atoms.meta)
    layout = view.space.layout
    for module in view.modules():
        a, b = segments_of(layout, module)
        expected = []
        for owner, (name, atoms) in enumerate(oracle.atoms.items()):
            key_rows = atoms.values[a.offset : a.offset + a.numel].reshape(a.shape)
            columns = atoms.values[b.offset : b.offset + b.numel].reshape(b.shape)
            scaling = view.get(name).scaling
            for rank in range(a.shape[0]):
                if (module, rank) not in atoms.pruned:
                    key, value = key_rows[rank].tobytes(), columns[:, rank].tobytes()
                    expected.append((key, value, owner, rank, atoms.meta.get("task"), scaling))
        bank = view.atoms(module)
        assert bank.keys.shape == (len(expected), a.shape[1])
        assert bank.values.shape == (b.shape[0], len(expected))
        found = [
            (
                bank.keys[n].tobytes(),
                bank.values[:, n].tobytes(),
                int(bank.owner[n]),
                int(bank.rank[n]),
                bank.tasks[n],
                float(bank.scaling[n]),
            )
            for n in range(len(bank))
        ]
        assert found == expected


# The contract


@contextmanager
def refused(error: type[MemtoolError], saying: str = "") -> Iterator[None]:
    """The block must raise this error, with these words in its message."""
    try:
        yield
    except error as raised:
        if saying not in str(raised):
            raise AssertionError(f"{saying!r} is not in {str(raised)!r}") from raised
    else:
        raise AssertionError(f"no {error.__name__} was raised")


def _with_three(url: str, space: Space) -> tuple[MemoryStore, OracleVersion]:
    """A new store with adapters t0, t1, t2, one a commit, and what it must hold."""
    store = MemoryStore.create(url, space)
    oracle = OracleVersion("write task 2")
    for task in range(3):
        values = some_values(space, task)
        with store.transaction(f"write task {task}", {"seed": task}) as txn:
            txn.add(f"t{task}", values, {"task": task})
        oracle = oracle.add(f"t{task}", values, {"task": task})
    return store, oracle


def check_created_once(url: str) -> None:
    """A store is there after create and not before, and is not made twice."""
    with refused(NotFoundError):
        MemoryStore.open(url)
    assert not MemoryStore.exists(url)
    store = MemoryStore.create(url, small_space())
    assert MemoryStore.exists(url)
    assert MemoryStore.open(url).space == store.space == small_space()
    assert_same(MemoryStore.open(url).view(), OracleVersion("create the memory"))
    with refused(AlreadyExistsError):
        MemoryStore.create(url, small_space())


def check_round_trip(url: str) -> None:
    """Values to the bit, metas, keys and blobs come back after reopening."""
    for dtype in ("float32", "float16", "bfloat16"):
        space = small_space(dtype)
        store, oracle = _with_three(f"{url}/{dtype}", space)
        keys = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
        with store.transaction("consolidate") as txn:
            txn.set_keys(keys)
            txn.put_blob("head", bytes(range(200)))
            txn.put_blob("empty", b"")
        oracle = replace(oracle.set_keys(keys), message="consolidate")
        oracle = oracle.put_blob("head", bytes(range(200))).put_blob("empty", b"")
        assert_same(MemoryStore.open(store.url).view(), oracle)
        assert store.verify().ok


def check_files(url: str) -> None:
    """A safetensors file comes back byte for byte, whatever its layout, and can be purged."""
    space = small_space()
    store = MemoryStore.create(url, space)
    layout = space.layout
    header = write_header([(s.name, s.shape) for s in layout.segments], layout.dtype)
    data = header + some_values(space, 3).tobytes()
    with store.transaction("import") as txn:
        txn.add_file("file", data)
    assert MemoryStore.open(url).export("file") == data
    with store.transaction("ragged") as txn:
        for seed in range(3):
            txn.add_file(f"ragged {seed}", ragged_file(seed))
        txn.purge(txn.add_file("never", ragged_file(3)))
    store = MemoryStore.open(url)
    assert [store.export(f"ragged {seed}") for seed in range(3)] == [*map(ragged_file, range(3))]
    with refused(SpaceMismatchError, "ragged 0"):
        store.view().values()
    with refused(SchemaError), store.transaction("none") as txn:
        txn.add_file("none", ragged_file(4)[:-1])
    with store.transaction("purge") as txn:
        txn.purge("ragged 1")
    store.gc(keep_last=1)
    assert [store.export(f"ragged {seed}") for seed in (0, 2)] == [*map(ragged_file, (0, 2))]
    assert store.verify().ok


def check_taken(url: str) -> None:
    """Rows and blobs of another memory come bit for bit, of every kind, and it stays as it was."""
    space = small_space()
    ours, theirs = (MemoryStore.create(f"{url}/{name}", space) for name in ("ours", "theirs"))
    with theirs.transaction("all kinds") as txn:
        fill(txn, space, "row", 1)
        txn.add_file("ragged", ragged_file(2), {"task": 2, "scaling": 0.5})
        txn.add_atoms("atoms", some_values(space, 3), {"task": 3})
        txn.prune_atoms("atoms", {MODULE: [0]})
        txn.put_blob("kept", bytes(range(99)))
    head, view = theirs.head(), theirs.view()
    with ours.transaction("take") as txn:
        for name in ("ragged", "atoms", "row"):
            new = txn.take(view, name, {"task": 7})
            assert new.id != view.get(name).id
            assert txn.value(name).tobytes() == view.value(name).tobytes()
        txn.put_blob("kept", view.held_blob("kept"))
    mine = MemoryStore.open(ours.url).view()
    for name in ("ragged", "atoms", "row"):
        new, old = mine.get(name), view.get(name)
        for part in ("sha256", "scaling", "header", "kind", "pruned", "nbytes", "pieces"):
            assert getattr(new, part) == getattr(old, part), part
        assert (new.task, {**new.meta, "task": None}) == (7, {**old.meta, "task": None})
        assert mine.export(name) == view.export(name)
    assert mine.blob("kept") == bytes(range(99))
    assert theirs.head() == head
    with refused(AlreadyExistsError, "row"), ours.transaction("again") as txn:
        txn.take(view, "row")
    with refused(NotFoundError), ours.transaction("none") as txn:
        txn.take(view, "nobody")
    other = MemoryStore.create(f"{url}/other", small_space("float16"))
    with other.transaction("ragged rows fit everywhere") as txn:
        txn.take(view, "ragged")
    with refused(SpaceMismatchError, "row"), other.transaction("others do not") as txn:
        txn.take(view, "row")
    assert ours.verify().ok
    assert other.verify().ok


def check_history(url: str) -> None:
    """Old versions stay as they were; tags, branches, rollback and diff name them."""
    space = small_space()
    store, oracle = _with_three(url, space)
    ids = [version.id for version in store.log()]
    assert [version.message for version in store.log()][-1] == "create the memory"
    assert store.log()[0].metadata == {"seed": 2}
    store.tag("v1", "HEAD~1")
    store.branch("side", "HEAD~2")
    with store.transaction("aside", branch="side") as txn:
        fill(txn, space, "s", 7)
    for ref, names in {"v1": ["t0", "t1"], "side": ["t0", "s"], "HEAD": ["t0", "t1", "t2"]}.items():
        assert [record.name for record in store.view(ref).adapters] == names
    backup = store.rollback("HEAD~1")
    assert store.head() == ids[1]
    assert store.branches()[backup] == ids[0]
    with store.transaction("another way") as txn:
        fill(txn, space, "t2", 9)
    assert_same(MemoryStore.open(url).view(backup), oracle)
    assert store.view().value("t2").tobytes() == some_values(space, 9).tobytes()
    assert [record.name for record in store.diff("v1", "HEAD").added] == ["t2"]
    store.delete_tag("v1")
    store.delete_branch(backup)
    assert (store.tags(), sorted(store.branches())) == ({}, ["main", "side"])
    with refused(NotFoundError):
        store.view("v1")
    assert store.verify().ok


def check_nothing_is_lost(url: str) -> None:
    """A transaction on an older version conflicts; `run` runs it again; an error leaves nothing."""
    space = small_space()
    one = MemoryStore.create(url, space)
    two = MemoryStore.open(url)
    with refused(ConflictError), one.transaction("late") as late:
        fill(late, space, "late", 0)
        with two.transaction("early") as early:
            fill(early, space, "early", 1)
    calls = []

    def add(txn: Transaction) -> None:
        calls.append(len(txn.adapters))
        if len(calls) == 1:
            with two.transaction("between") as between:
                fill(between, space, "between", 2)
        fill(txn, space, "again", 3)

    one.run(add, "again")
    assert calls == [1, 2]
    with refused(SchemaError), one.transaction("broken") as txn:
        fill(txn, space, "never", 4)
        txn.put_blob("a/b", b"")
    view = MemoryStore.open(url).view()
    assert [record.name for record in view.adapters] == ["early", "between", "again"]
    assert [version.message for version in one.log()][:3] == ["again", "between", "early"]
    assert one.verify().ok


def check_gc(url: str) -> None:
    """Collecting garbage takes old versions away; the newest and the tagged ones stay whole."""
    space = small_space()
    store, oracle = _with_three(url, space)
    store.tag("kept", "HEAD~1")
    report = store.gc(keep_last=1)
    assert len(report.expired) == 2
    assert [version.message for version in store.log()] == ["write task 2"]
    assert_same(MemoryStore.open(url).view(), oracle)
    assert [record.name for record in store.view("kept").adapters] == ["t0", "t1"]
    assert store.verify().ok


def check_atoms(url: str) -> None:
    """Atoms go in beside adapters, are pruned and removed, and every older version stays."""
    space = small_space()
    store, oracle = _with_three(url, space)
    versions = {store.head(): oracle}
    values = some_values(space, 5)
    with store.transaction("atoms") as txn:
        txn.add_atoms("atoms of 5", values, {"task": 5, "scaling": 0.5})
        txn.add_atoms("atoms of 6", values, {"task": 6})
    oracle = replace(oracle, message="atoms")
    oracle = oracle.add_atoms("atoms of 5", values, {"task": 5, "scaling": 0.5})
    versions[store.head()] = oracle = oracle.add_atoms("atoms of 6", values, {"task": 6})
    with store.transaction("prune") as txn:
        txn.prune_atoms("atoms of 5", {MODULE: [1]})
    oracle = replace(oracle, message="prune").prune("atoms of 5", MODULE, [1])
    versions[store.head()] = oracle
    with store.transaction("remove") as txn:
        txn.remove("atoms of 6")
    versions[store.head()] = replace(oracle, message="remove").remove("atoms of 6")
    store = MemoryStore.open(url)
    for version, expected in versions.items():
        assert_same(store.view(version), expected)
    assert store.verify().ok


def check_purge(url: str) -> None:
    """A purged row is out of the newest version, bytes and all; the others are as they were."""
    space = small_space()
    store, oracle = _with_three(url, space)
    keys = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    with store.transaction("keys") as txn:
        txn.set_keys(keys)
    gone = store.view().get("t1")
    store.tag("before")
    with store.transaction("purge") as txn:
        txn.purge("t1")
    after = replace(oracle.set_keys(keys), message="purge").purge("t1")
    assert_same(MemoryStore.open(url).view(), after)
    assert store.view().catalog.records[gone.id].state == "purged"
    assert store.holders(gone.id) == ["before"]
    assert set(store.find_bytes([gone.sha256, "0" * 64])) == {gone.sha256}
    store.delete_tag("before")
    assert store.holders(gone.id) == []
    store.gc(keep_last=1)
    assert_same(MemoryStore.open(url).view(), after)
    assert store.verify().ok


CONTRACT: tuple[Callable[[str], None], ...] = (
    check_created_once,
    check_round_trip,
    check_files,
    check_taken,
    check_history,
    check_nothing_is_lost,
    check_gc,
    check_atoms,
    check_purge,
)
"""Every check takes a url (a path of a directory, or s3://bucket/prefix) where nothing is yet."""
