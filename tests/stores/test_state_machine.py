"""Any sequence of operations, crashes and reopenings: the store is what the oracle says."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memtool_stores import MemoryStore, Transaction, VersionExpiredError
from memtool_stores.testing import (
    MODULE,
    OracleVersion,
    assert_same,
    file_data,
    ragged_file,
    small_space,
    some_values,
)
from memtool_stores.tree import sha256

seeds = st.integers(0, 5)


class StoreMachine(RuleBasedStateMachine):
    """`versions` is every version by id, `line` the ids of main, oldest first."""

    @initialize(dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
    def create(self, dtype: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memtool-store-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("MEMTOOL_CACHE", str(self.folder / "cache"))
        self.space = small_space(dtype)
        self.store = MemoryStore.create(self.folder / "memory", self.space)
        self.count = 0
        self.versions = {self.store.head(): OracleVersion("create the memory")}
        self.line = [self.store.head()]
        self.tags: dict[str, str] = {}
        self.backups: dict[str, list[str]] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            assert self.store.verify("full").ok
            self.patch.undo()
            shutil.rmtree(self.folder)

    @property
    def now(self) -> OracleVersion:
        return self.versions[self.line[-1]]

    def _name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def _commit(self, txn: Transaction, oracle: OracleVersion) -> None:
        self.versions[txn.version] = oracle
        self.line.append(txn.version)

    def _message(self, message: str) -> OracleVersion:
        return replace(self.now, message=message)

    @rule(some=st.lists(seeds, min_size=1, max_size=3))
    def add(self, some: list[int]) -> None:
        oracle = self._message("add")
        with self.store.transaction("add") as txn:
            for seed in some:
                name, values = self._name(), some_values(self.space, seed)
                txn.add(name, values, {"seed": seed})
                oracle = oracle.add(name, values, {"seed": seed})
        self._commit(txn, oracle)

    @rule(some=st.lists(seeds, min_size=1, max_size=2))
    def add_ragged(self, some: list[int]) -> None:
        oracle = self._message("ragged")
        with self.store.transaction("ragged") as txn:
            for seed in some:
                name, file = self._name(), ragged_file(seed)
                txn.add_file(name, file, {"seed": seed})
                oracle = oracle.add_ragged(name, file, {"seed": seed})
        self._commit(txn, oracle)

    @rule(seed=seeds, task=st.integers(0, 3))
    def add_atoms(self, seed: int, task: int) -> None:
        name, values = self._name(), some_values(self.space, seed)
        with self.store.transaction("atoms") as txn:
            txn.add_atoms(name, values, {"task": task})
        self._commit(txn, self._message("atoms").add_atoms(name, values, {"task": task}))

    @precondition(lambda self: self.now.atoms)
    @rule(which=st.integers(0, 99), ranks=st.sets(st.integers(0, 1), min_size=1))
    def prune(self, which: int, ranks: set[int]) -> None:
        name = list(self.now.atoms)[which % len(self.now.atoms)]
        with self.store.transaction("prune") as txn:
            txn.prune_atoms(name, {MODULE: ranks})
        after = self._message("prune").prune(name, MODULE, sorted(ranks))
        # What is pruned already makes no version.
        if after.atoms[name].pruned != self.now.atoms[name].pruned:
            self._commit(txn, after)
        assert txn.version == self.line[-1]

    @precondition(lambda self: self.now.adapters or self.now.atoms)
    @rule(which=st.integers(0, 99))
    def remove(self, which: int) -> None:
        names = [*self.now.adapters, *self.now.atoms]
        name = names[which % len(names)]
        with self.store.transaction("remove") as txn:
            txn.remove(name)
        self._commit(txn, self._message("remove").remove(name))

    @precondition(lambda self: self.now.adapters or self.now.atoms or self.now.removed)
    @rule(which=st.integers(0, 99))
    def purge(self, which: int) -> None:
        names = [*self.now.adapters, *self.now.atoms, *self.now.removed]
        name = names[which % len(names)]
        with self.store.transaction("purge") as txn:
            txn.purge(name)
        self._commit(txn, self._message("purge").purge(name))
        assert not list((self.folder / "cache").rglob("*.values"))

    @precondition(lambda self: self.now.adapters)
    @rule(seed=seeds, layers=st.integers(1, 3), width=st.integers(1, 4))
    def set_keys(self, seed: int, layers: int, width: int) -> None:
        shape = (layers, len(self.now.adapters), width)
        keys = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        with self.store.transaction("keys") as txn:
            txn.set_keys(keys)
        self._commit(txn, self._message("keys").set_keys(keys))

    @rule(name=st.sampled_from(["heads", "query-modules"]), data=st.binary(max_size=40))
    def put_blob(self, name: str, data: bytes) -> None:
        with self.store.transaction("blob") as txn:
            txn.put_blob(name, data)
        self._commit(txn, self._message("blob").put_blob(name, data))

    @rule(back=st.integers(0, 3))
    def tag(self, back: int) -> None:
        version = self.line[-1 - back % len(self.line)]
        name = self._name()
        self.store.tag(name, version)
        self.tags[name] = version

    @rule(back=st.integers(0, 3))
    def rollback(self, back: int) -> None:
        back %= len(self.line)
        backup = self.store.rollback(f"HEAD~{back}")
        self.backups[backup] = list(self.line)
        self.line = self.line[: len(self.line) - back]

    @rule(keep=st.integers(1, 3))
    def gc(self, keep: int) -> None:
        before = {v.id for v in self.store.log()}
        report = self.store.gc(keep_last=keep)
        self.line = self.line[-keep:]
        assert {v.id for v in self.store.log()} == set(self.line)
        assert not set(report.expired) & set(self.line)
        for version in before & set(report.expired):
            with pytest.raises(VersionExpiredError):
                self.store.view(version)
        kept = {*self.line, *self.tags.values()}
        for name in self.backups:
            self.backups[name] = [v.id for v in reversed(self.store.log(name))]
            kept |= set(self.backups[name])
        self.versions = {v: oracle for v, oracle in self.versions.items() if v in kept}
        # What no version holds is nowhere; what one holds is there.
        rows = {sha256(some_values(self.space, seed)) for seed in range(6)}
        rows |= {sha256(file_data(ragged_file(seed))) for seed in range(6)}
        held = set().union(*(oracle.row_hashes() for oracle in self.versions.values()))
        assert set(self.store.find_bytes(rows)) == rows & held

    @rule()
    def error_inside(self) -> None:
        with (  # noqa: PT012
            pytest.raises(ZeroDivisionError),
            self.store.transaction("never") as txn,
        ):
            txn.add(self._name(), some_values(self.space, 0))
            raise ZeroDivisionError

    @rule(seed=seeds)
    def crash_before_the_branch_moves(self, seed: int) -> None:
        """Chunks, manifests and a snapshot reach the disk, but nothing leads to them."""
        session = self.store._repository.writable_session("main")
        values = zarr.open_group(session.store, mode="r+")["values"]
        values.resize((values.shape[0] + 1, self.space.numel))
        values[-1] = some_values(self.space, seed)
        session.flush("never")
        self.store = MemoryStore.open(self.store.url)

    @rule()
    def reopen(self) -> None:
        self.store = MemoryStore.open(self.store.url)

    @rule()
    def lose_the_cache(self) -> None:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    @invariant()
    def main_is_what_the_oracle_says(self) -> None:
        if not hasattr(self, "store"):
            return
        assert [v.id for v in self.store.log()] == self.line[::-1]
        assert_same(self.store.view(), self.now)

    @rule(which=st.integers(0, 99))
    def look_back(self, which: int) -> None:
        assert self.store.tags() == self.tags
        assert {n: v[-1] for n, v in self.backups.items()} == {
            n: v for n, v in self.store.branches().items() if n != "main"
        }
        ids = sorted(self.versions)
        version = ids[which % len(ids)]
        assert_same(self.store.view(version), self.versions[version])


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
