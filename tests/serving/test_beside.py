"""What a request gets, whatever is asked beside it; and a version that failed for a moment."""

from __future__ import annotations

import asyncio
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from memtool.errors import DataError, NotFoundError
from memtool.inference.predictor import Predicted, Predictor
from memtool.serving.batcher import Batcher
from memtool.serving.errors import status_of
from memtool.serving.forms import parsed
from memtool.serving.images import PictureRunner, Pictures
from memtool.serving.metrics import Metrics
from memtool.serving.models import Model, Models
from memtool_stores import StorageError
from tests.serving.conftest import Memory
from tests.serving.served import FORM, LINE, form


def test_who_asked_for_little_gets_little_beside_who_asks_for_all(memory: Memory) -> None:
    models = memory.models()
    assert isinstance(models.current.ready, Predictor)
    pixels = models.current.ready.pixels(memory.pictures[0], "a.png")

    async def both() -> list[list[Predicted]]:
        works = [Pictures(models.current, [pixels], topk=n, adapters=n - 1) for n in (1, 2)]
        return PictureRunner(Metrics(lambda: 0), 8)(works)

    (little,), (all_,) = asyncio.run(both())
    assert (len(little.classes), len(little.weights)) == (1, 0)
    assert (len(all_.classes), len(all_.weights)) == (2, 1)
    models.close()


def test_what_a_failed_batch_answered_in_part_is_counted_once(memory: Memory) -> None:
    models, metrics = memory.models(), Metrics(lambda: 0)
    good, broken = models.current.ready, copy(models.current.ready)
    assert isinstance(good, Predictor)
    assert isinstance(broken, Predictor)
    pixels = good.pixels(memory.pictures[0], "a.png")

    def fail(*_: Any, **__: Any) -> Any:
        raise DataError("broken")

    broken.predict = fail  # type: ignore[method-assign]

    async def answered() -> list[Any]:
        runner = PictureRunner(metrics, 8)
        batcher = Batcher(runner, window=0.0, most=8, batched=metrics.batch)
        at_fault = Model(models.current.memory, None, broken)
        works = [
            Pictures(model, [pixels], topk=1, adapters=1)
            for model in (models.current, models.current, at_fault, models.current)
        ]
        batcher.put(works)
        batcher.start()
        found = await asyncio.gather(*(one.future for one in works), return_exceptions=True)
        await asyncio.to_thread(batcher.stop)
        return found

    found = asyncio.run(answered())
    assert [isinstance(one, DataError) for one in found] == [False, False, True, False]
    counted = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines())
    assert float(counted["memtool_inputs_total"]) == 3
    assert float(counted["memtool_batch_size_count"]) == 1
    assert float(counted["memtool_batch_size_sum"]) == 4
    used = [float(one) for name, one in counted.items() if "memtool_adapter_use_total{" in name]
    assert sum(used) == pytest.approx(3, rel=1e-3)
    models.close()


def test_fields_of_one_name_are_counted_too() -> None:
    many = b"".join(form(topk="1").removesuffix(f"--{LINE}--\r\n".encode()) for _ in range(17))
    with pytest.raises(HTTPException, match="16 fields"):
        parsed(many + form(), FORM, most=1)


def test_a_store_that_is_gone_for_a_while_is_said_as_that_and_not_where_it_was(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.copy(tmp_path / "served")
    monkeypatch.chdir(tmp_path / "served")
    models = Models("memory")
    Path("memory").rename("away")
    for word in ("memory@HEAD~1", "task-1-seed-0"):
        with pytest.raises(StorageError, match="the memory memory is not where it was") as raised:
            asyncio.run(models.named(word))
        assert (raised.value.transient, status_of(raised.value)) == (True, 503)
    assert asyncio.run(models.named("auto")) is models.current
    with pytest.raises(StorageError, match="is not where it was"):
        asyncio.run(models.reload())
    told = models.told(NotFoundError(f"no store at {Path('memory').resolve()}: no such folder"))
    assert told == "no store at memory: no such folder"
    Path("away").rename("memory")
    assert asyncio.run(models.named("task-1-seed-0")).adapter == "task-1-seed-0"
    models.close()


@pytest.mark.parametrize("transient", [True, False])
def test_a_version_that_nobody_could_bring_is_tried_again(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, transient: bool
) -> None:
    name = f"tried-{transient}"
    models = memory.models()
    store = models.current.memory.store
    models.close()
    store.branch(name, "HEAD~2")
    models = memory.models(f"@{name}")
    before, opened = models.current.version, models._opened
    store.delete_branch(name)
    store.branch(name, "HEAD")
    calls = []

    def once(version: str) -> Any:
        calls.append(version)
        if len(calls) == 1:
            raise StorageError("no answer", transient=transient)
        return opened(version)

    monkeypatch.setattr(models, "_opened", once)
    assert asyncio.run(models.look()) == "no answer"
    assert models.current.version == before
    assert (asyncio.run(models.look()) is None) == transient
    assert (models.current.version != before) == transient
    store.delete_branch(name)
    models.close()
