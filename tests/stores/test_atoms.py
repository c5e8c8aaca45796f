"""Rank-1 atoms: rows of their own beside the adapters, read as one bank a module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memtool_stores import (
    AlreadyExistsError,
    Backbone,
    Layout,
    MemoryStore,
    NotFoundError,
    SchemaError,
    Segment,
    Space,
    SpaceMismatchError,
)
from memtool_stores.testing import MODULE, fill, small_space, some_values


@pytest.fixture
def wide() -> Space:
    """Two modules of different widths, rank 3, and two tensors that are no module."""
    shapes = {
        "fc1.lora_A": (3, 4),
        "norm.weight": (5,),
        "fc1.lora_B": (6, 3),
        "fc2.lora_A": (3, 2),
        "fc2.lora_B": (7, 3),
        "fc3.lora_A": (3, 2),
    }
    segments, offset = [], 0
    for name, shape in shapes.items():
        segments.append(Segment(name, shape, offset))
        offset += segments[-1].numel
    layout = Layout(tuple(segments), "float32", rank=3, alpha=6.0, targets=("fc1", "fc2"))
    return Space(Backbone("tiny", "", "00" * 32), layout)


def test_a_bank_gives_the_products_of_its_rows(tmp_path: Path, wide: Space) -> None:
    """Summed over its atoms, scaling times value times key is scaling times B A of each row."""
    store = MemoryStore.create(tmp_path / "m", wide)
    rows = [some_values(wide, seed) for seed in range(3)]
    with store.transaction("atoms") as txn:
        for task, row in enumerate(rows):
            txn.add_atoms(f"a{task}", row, {"task": task, "scaling": 0.25 + task})
        fill(txn, wide, "an adapter", 9)
    view = MemoryStore.open(store.url).view()
    assert view.modules() == ("fc1", "fc2")
    for module in view.modules():
        a, b = (wide.layout.segment(f"{module}.lora_{x}") for x in "AB")
        bank = view.atoms(module)
        assert len(bank) == 9
        assert bank.tasks == (0, 0, 0, 1, 1, 1, 2, 2, 2)
        assert bank.rank.tolist() == [0, 1, 2] * 3
        assert bank.owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        found = (bank.values.astype(np.float64) * bank.scaling) @ bank.keys.astype(np.float64)
        expected = sum(
            (0.25 + task)
            * row[b.offset : b.offset + b.numel].reshape(b.shape).astype(np.float64)
            @ row[a.offset : a.offset + a.numel].reshape(a.shape).astype(np.float64)
            for task, row in enumerate(rows)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    with pytest.raises(NotFoundError, match="fc3"):
        view.atoms("fc3")


def test_pruned_atoms_are_left_out_from_then_on(tmp_path: Path, wide: Space) -> None:
    store = MemoryStore.create(tmp_path / "m", wide)
    with store.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(wide, 0))
        txn.add_atoms("b", some_values(wide, 1))
        # What was added here can be pruned here.
        txn.prune_atoms("b", {"fc2": [0]})
    before = store.view()
    with store.transaction("prune") as txn:
        txn.prune_atoms("a", {"fc1": [2, 0, 2]})
        txn.prune_atoms("a", {"fc1": [0], "fc2": []})
    view = MemoryStore.open(store.url).view()
    assert dict(view.get("a").pruned) == {"fc1": (0, 2)}
    assert view.atoms("fc1").rank.tolist() == [1, 0, 1, 2]
    assert view.atoms("fc2").rank.tolist() == [0, 1, 2, 1, 2]
    assert before.atoms("fc1").rank.tolist() == [0, 1, 2, 0, 1, 2]
    assert view.value("a").tobytes() == some_values(wide, 0).tobytes()
    head = store.head()
    with store.transaction("out already") as txn:
        txn.prune_atoms("a", {"fc1": [0]})
    assert store.head() == head
    with store.transaction("rename") as txn:
        txn.update("a", name="c", task=4)
    assert dict(store.view().get("c").pruned) == {"fc1": (0, 2)}
    assert store.view().atoms("fc1").tasks == (4, None, None, None)
    assert store.verify().ok


def test_all_atoms_may_go(store: MemoryStore, space: Space) -> None:
    with store.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(space, 0))
        txn.prune_atoms("a", {MODULE: [0, 1]})
    bank = store.view().atoms(MODULE)
    assert (len(bank), bank.keys.shape, bank.values.shape) == (0, (0, 5), (6, 0))
    with store.transaction("remove") as txn:
        txn.remove("a")
    assert store.view().atom_records == ()
    assert len(store.view().atoms(MODULE)) == 0


def test_what_atoms_must_be(grown: MemoryStore, space: Space, tmp_path: Path) -> None:
    with grown.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(space, 0))
    with grown.transaction("nothing") as txn:
        for name in ("a", "t0"):
            with pytest.raises(AlreadyExistsError):
                txn.add_atoms(name, some_values(space, 0))
            with pytest.raises(AlreadyExistsError):
                txn.add(name, some_values(space, 0))
        with pytest.raises(SpaceMismatchError):
            txn.add_atoms("short", some_values(space, 0)[:-1])
        with pytest.raises(SchemaError, match="is an adapter"):
            txn.prune_atoms("t0", {MODULE: [0]})
        with pytest.raises(SchemaError, match="no atom 2"):
            txn.prune_atoms("a", {MODULE: [0, 2]})
        with pytest.raises(SchemaError, match="no atom -1"):
            txn.prune_atoms("a", {MODULE: [-1]})
        with pytest.raises(NotFoundError, match="no module"):
            txn.prune_atoms("a", {"head": [0]})
        with pytest.raises(NotFoundError):
            txn.prune_atoms("b", {MODULE: [0]})
        assert not txn.changed
    layout = Layout((Segment("weight", (3,), 0),), "float32", rank=1, alpha=1.0, targets=())
    flat = MemoryStore.create(tmp_path / "flat", Space(space.backbone, layout))
    with (
        pytest.raises(SpaceMismatchError, match="no modules"),
        flat.transaction("atoms") as txn,
    ):
        txn.add_atoms("a", np.zeros(3, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_adapters_do_not_notice_atoms(tmp_path: Path, dtype: str) -> None:
    space = small_space(dtype)
    plain = MemoryStore.create(tmp_path / "plain", space)
    mixed = MemoryStore.create(tmp_path / "mixed", space)
    keys = np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)
    for store in (plain, mixed):
        for task in range(2):
            with store.transaction("write") as txn:
                if store is mixed:
                    txn.add_atoms(f"atoms {task}", some_values(space, 10 + task))
                fill(txn, space, f"t{task}", task)
        with store.transaction("keys") as txn:
            txn.set_keys(keys)
    one, two = plain.view(), mixed.view()
    assert len(one) == len(two) == 2
    assert [r.name for r in one.adapters] == [r.name for r in two.adapters]
    assert one.values().tobytes() == two.values().tobytes()
    assert one.values(["t1"]).tobytes() == two.values(["t1"]).tobytes()
    assert np.array_equal(two.keys(), keys)  # type: ignore[arg-type]
    assert two.segment(f"{MODULE}.lora_B").shape == (2, 6, 2)
    assert [r.kind for r in two.catalog.records.values()] == ["atoms", "adapter"] * 2
    with pytest.raises(NotFoundError, match="row of atoms"):
        two.values(["atoms 0"])
    assert two.value("atoms 0").tobytes() == some_values(space, 10).tobytes()
    assert two.get("atoms 0") == two.get(two.get("atoms 0").id)
    assert mixed.verify().ok


def test_diff_tells_atoms_from_adapters(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("atoms") as txn:
        for name in "abc":
            txn.add_atoms(name, some_values(space, 0))
    added = grown.diff("HEAD~1")
    assert [r.name for r in added.added_atoms] == ["a", "b", "c"]
    assert (added.added, added.changed, added.pruned_atoms) == ((), (), {})
    with grown.transaction("change") as txn:
        txn.remove("a")
        txn.prune_atoms("b", {MODULE: [0, 1]})
        txn.update("c", task=3)
    changed = grown.diff("HEAD~1")
    assert [r.name for r in changed.removed_atoms] == ["a"]
    assert [r.name for r in changed.changed_atoms] == ["b", "c"]
    assert changed.pruned_atoms == {"b": 2}
    assert (changed.removed, changed.changed, changed.added_atoms) == ((), (), ())


def test_an_append_writes_one_row(grown: MemoryStore, space: Space) -> None:
    chunks = Path(grown.url) / "ice" / "chunks"
    before = {path.name for path in chunks.iterdir()}
    with grown.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(space, 5))
    written = [path for path in chunks.iterdir() if path.name not in before]
    rows = [path for path in written if path.stat().st_size == space.layout.nbytes + 4]
    assert len(rows) == 1
    assert rows[0].read_bytes()[:-4] == some_values(space, 5).tobytes()
    # The other one is the last chunk of the catalog.
    assert len(written) == 2


def test_a_damaged_row_of_atoms_is_named(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(space, 5))
    for path in (Path(grown.url) / "ice" / "chunks").iterdir():
        data = bytearray(path.read_bytes())
        if data.startswith(some_values(space, 5).tobytes()):
            data[3] ^= 1
            path.write_bytes(data)
    damages = grown.verify().damages
    assert [(d.what, d.name) for d in damages] == [("values", "a")]
    assert grown.view().values().shape == (3, space.numel)


def test_rows_of_the_other_kind_between_are_skipped(store: MemoryStore, space: Space) -> None:
    """Far apart in the values, one after another in the cache."""
    with store.transaction("many") as txn:
        txn.add_atoms("first", some_values(space, 1000))
        for seed in range(600):
            fill(txn, space, f"t{seed}", seed)
        txn.add_atoms("last", some_values(space, 2000))
    view = store.view()
    expected = np.stack([some_values(space, seed)[:10].reshape(2, 5) for seed in (1000, 2000)])
    assert np.array_equal(view.atoms(MODULE).keys, expected.reshape(4, 5))
    assert np.array_equal(view.values(), np.stack([some_values(space, s) for s in range(600)]))
