"""Keys and heads of thousands of adapters are made with what is known of one task in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from memtool.heads import FeatureStatistics, solve_recalled_head
from memtool.memories.closed_form import QueryStatistics
from memtool.methods.mira import moments as prompts
from memtool.methods.mira.keys import Draws, start_keys
from memtool.methods.mira.moments import PromptState, counted, looks_blob, solved_keys
from memtool.methods.mira.sums import Asked
from memtool.methods.on_demand import Counted, OnDemand
from memtool.methods.routed.memory import kept_bytes
from memtool.sections import ConsolidateSettings, MemorySettings
from memtool.settings import HeadSettings
from memtool_stores import MemoryStore, Transaction
from memtool_stores.held import Spool
from memtool_stores.testing import fill, small_space

TASKS, DIM, CLASSES = 1_000, 5, 3


class Live:
    """How many of the things that were given to it are there at once, at most."""

    def __init__(self) -> None:
        self.now = self.most = self.ever = 0

    def seen(self, one: Any) -> None:
        self.now, self.ever = self.now + 1, self.ever + 1
        self.most = max(self.most, self.now)
        weakref.finalize(one, self._gone)

    def _gone(self) -> None:
        self.now -= 1


def _queries(task: int) -> torch.Tensor:
    """(1, 12, DIM) around a centre of the task's own."""
    generator = torch.Generator().manual_seed(task)
    return torch.randn(1, 12, DIM, generator=generator) + 4 * torch.randn(
        1, 1, DIM, generator=generator
    )


def _counted_queries(task: int) -> QueryStatistics:
    found = QueryStatistics(1, DIM)
    found.add(0, _queries(task))
    return found


def _prompts(task: int) -> dict[str, torch.Tensor]:
    """As `moments_of` and `witnesses` give it, of two clusters."""
    rows = _queries(task)[0]
    halves = rows[:6], rows[6:]
    root = torch.cat([half - half.mean(dim=0) for half in halves])
    mean = torch.stack([half.mean(dim=0) for half in halves])
    return {"count": torch.tensor([6, 6]), "mean": mean, "root": root, "some": rows[::3]}


def _features(task: int) -> FeatureStatistics:
    found = FeatureStatistics(DIM, CLASSES)
    found.add(_queries(task)[0], torch.arange(12) % CLASSES)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    """As many tasks, each with an adapter, its moments, and what its prompts look like."""
    space = small_space()
    made = MemoryStore.create(tmp_path_factory.mktemp("many") / "memory", space)
    with made.transaction("many") as txn:
        for task in range(TASKS):
            id = fill(txn, space, f"task-{task}", task)
            txn.update(id, task=task, task_name=f"task-{task}")
            txn.put_blob(f"queries.{task}", _counted_queries(task).to_bytes())
            txn.put_blob(f"features.{task}", _features(task).to_bytes())
            txn.put_blob(looks_blob(id), kept_bytes(_prompts(task), "mira"))
    return made


@pytest.fixture
def spool() -> Iterator[Spool]:
    with Spool() as made:
        yield made


def _counted(store: MemoryStore, name: str, kind: Any, live: Live, spool: Spool) -> Counted[Any]:
    def read(data: bytes, where: str) -> Any:
        found = kind.from_bytes(data, where)
        live.seen(found)
        return found

    return Counted(store.view(), {t: f"{name}.{t}" for t in range(TASKS)}, read, spool)


@pytest.mark.parametrize("separation", ["softmax", "affine"])
def test_keys_in_closed_form_hold_one_task(
    store: MemoryStore, spool: Spool, separation: str
) -> None:
    live = Live()
    known = _counted(store, "queries", QueryStatistics, live, spool)
    memory = MemorySettings(separation=separation, similarity="dot")
    args = range(TASKS), Draws(0, (), (), 0)
    keys = start_keys(ConsolidateSettings(), memory, Asked.of(known.values()), *args)
    assert (live.ever, live.most) == (TASKS, pytest.approx(2, abs=1))
    parts = [_counted_queries(task) for task in range(TASKS)]
    assert torch.equal(keys, start_keys(ConsolidateSettings(), memory, Asked.of(parts), *args))
    hits = sum(
        int((_queries(task)[0] @ keys[0, :, :-1].T + keys[0, :, -1]).argmax(1)[0] == task)
        for task in range(0, TASKS, 100)
    )
    assert hits > 0 or separation == "affine"


@pytest.mark.parametrize("kind", ["lda", "ridge", "ncm"])
def test_a_head_of_all_tasks_holds_one_of_them(store: MemoryStore, spool: Spool, kind: Any) -> None:
    live = Live()
    known = _counted(store, "features", FeatureStatistics, live, spool)
    settings = HeadSettings(kind=kind, scope="shared")
    read: list[int] = []

    def no_head(task: int) -> None:
        read.append(task)

    trained = OnDemand(range(TASKS), no_head)
    head = solve_recalled_head(settings, known, trained, range(TASKS))
    assert (live.ever, live.most, read) == (TASKS, pytest.approx(2, abs=1), [])
    held = {task: _features(task) for task in range(TASKS)}
    wanted = solve_recalled_head(settings, held, trained, range(TASKS))
    assert torch.equal(head.weight, wanted.weight)
    assert torch.equal(head.bias, wanted.bias)


def test_keys_of_prompts_hold_what_is_known_of_one_task(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, read = Live(), prompts.read_moments

    def seen(view: Any, blob: str) -> Any:
        found = read(view, blob)
        live.seen(found["root"])
        return found

    monkeypatch.setattr(prompts, "read_moments", seen)
    view = store.view()
    txn = Transaction(view)
    prompts.put_keys(txn, view=view, new={}, state=PromptState(look_at=("final",), clusters=2))
    keys = txn._keys
    assert live.ever == 2 * TASKS  # once for the keys, once for the witnesses
    assert live.most <= 3
    held = [[read(view, looks_blob(record.id))] for record in view.adapters]
    asked = Asked.of(map(counted, held), by_class=True)
    wanted = torch.stack([one.flatten(1) for one in solved_keys(asked)], dim=1)
    assert keys is not None
    assert np.array_equal(keys, wanted.numpy())


def test_what_was_put_is_read_from_the_spool_and_the_rest_from_the_store(
    store: MemoryStore, spool: Spool
) -> None:
    of_bytes: Callable[[bytes, str], FeatureStatistics] = FeatureStatistics.from_bytes
    known = Counted(store.view(), {7: "features.7", 3: "features.3"}, of_bytes, spool)
    assert [*known] == [7, 3]
    known.put(9, _features(1))
    known.put(3, _features(2))
    known.in_order([9, 3])
    assert [*known] == [9, 3]
    assert torch.equal(known[9].sums, _features(1).sums)
    assert torch.equal(known[3].sums, _features(2).sums)
    assert known.waiting(3).data() == _features(2).to_bytes()
    for task in (7, 11):
        with pytest.raises(KeyError):
            known[task]
