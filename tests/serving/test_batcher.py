"""Batches of requests: who is at fault fails alone; and what is kept, and parsed, of them."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from memtool.errors import DataError, MemtoolError, NotFoundError
from memtool.serving import app as apps
from memtool.serving import models as kept
from memtool.serving.batcher import Batcher, Work
from memtool.serving.models import Model
from tests.serving.conftest import Memory
from tests.serving.served import FORM, form, served


class Number(Work):
    def __init__(self, number: int, *, begun: bool = False) -> None:
        super().__init__(1)
        self.number = number
        self.begun = begun


def answers(
    run: Callable[[Sequence[Number]], list[int]],
    works: Callable[[], list[Number]],
    batched: Callable[[int], None] = lambda _: None,
) -> Any:
    """What a batch of works came to."""

    async def together() -> list[Any]:
        batcher = Batcher(run, window=0.0, most=64, batched=batched)
        asked = works()
        batcher.put(asked)
        batcher.start()
        try:
            return await asyncio.gather(*(one.future for one in asked), return_exceptions=True)
        finally:
            await asyncio.to_thread(batcher.stop)

    return asyncio.run(together())


@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError])
def test_the_one_at_fault_fails_alone(kind: type[Exception]) -> None:
    sizes = []

    def run(works: Sequence[Number]) -> list[int]:
        sizes.append(len(works))
        if any(one.number == 2 for one in works):
            raise kind("two")
        return [one.number**2 for one in works]

    found = answers(run, lambda: [Number(n) for n in range(4)])
    assert sizes == [4, 2, 1, 1]  # two of the half that must fail are not run together again
    assert [found[0], found[1], found[3]] == [0, 1, 9]
    assert isinstance(found[2], DataError if kind is DataError else MemtoolError)
    assert ("two" in str(found[2])) == (kind is DataError)  # what a bug says is for the log


@pytest.mark.parametrize("bad", [{0}, {31}, {63}, {7, 40}, set(range(64)), {-1}])
def test_a_bad_request_is_isolated_in_few_runs_and_its_batch_counts_once(bad: set[int]) -> None:
    runs, well, counted = [], [], []

    def run(works: Sequence[Number]) -> list[int]:
        numbers = [one.number for one in works]
        runs.append(numbers)
        if bad & {*numbers} or (bad == {-1} and len(runs) == 1):  # once: nobody's fault
            raise DataError("bad")
        well.extend(numbers)
        return numbers

    found = answers(run, lambda: [Number(n) for n in range(64)], counted.append)
    for number, one in enumerate(found):
        assert isinstance(one, DataError) if number in bad else one == number
    assert counted == [64]
    assert sorted(well) == sorted({*range(64)} - bad)  # none twice
    assert len(runs) <= (1 + 2 * 6 * len(bad) if len(bad) < 64 else 2 * 64)


def test_what_was_told_in_part_is_not_told_again() -> None:
    def run(works: Sequence[Number]) -> list[int]:
        if len(works) > 1:
            raise DataError("together")
        return [one.number for one in works]

    found = answers(run, lambda: [Number(1, begun=True), Number(2)])
    assert isinstance(found[0], DataError)
    assert found[1] == 2


def test_models_that_are_asked_for_stay(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT", 2)
    models = memory.models()
    made = []
    monkeypatch.setattr(
        models,
        "_made",
        lambda memory, adapter: made.append(adapter) or Model(memory, adapter, None),
    )
    for name in ("task-1-seed-0", "task-2-seed-0", "task-1-seed-0", "upright", "task-1-seed-0"):
        assert asyncio.run(models.named(name)).adapter == name
    assert made == ["task-1-seed-0", "task-2-seed-0", "upright"]
    asyncio.run(models.named("task-2-seed-0"))
    assert made[3:] == ["task-2-seed-0"]
    models.close()


def test_a_task_is_a_model_and_a_slip_in_its_name_is_told(memory: Memory) -> None:
    models = memory.models()
    assert asyncio.run(models.named("upright")).adapter == "upright"
    for word, meant in (("uprigth", "upright"), ("task-1-seed0", "task-1-seed-0")):
        with pytest.raises(NotFoundError, match=f"no model '{word}'") as raised:
            asyncio.run(models.named(word))
        assert f"did you mean '{meant}'" in str(raised.value.expected)
    models.close()


def test_large_bodies_are_parsed_in_another_thread_and_an_error_has_the_headers_of_all(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def seen(name: str) -> None:
        before = getattr(apps, name)

        def parse(*given: Any) -> Any:
            threads.append((name, threading.current_thread().name))
            return before(*given)

        monkeypatch.setattr(apps, name, parse)

    seen("_of_json")
    seen("_of_form")
    picture = memory.pictures[0]
    with served(memory.models(), window=0.0) as at:
        assert at.send(("a.png", picture)).status == 200
        large = ("b.png", b"x" * 300_000)
        assert at.ask("/v1/predict", form(("a.png", picture), large), {"Content-Type": FORM}).json
        text = base64.b64encode(picture).decode()
        body = {"images": [text, {"image": text, "file": "x" * 300_000}]}
        assert at.ask("/v1/predict", json.dumps(body).encode()).status == 200
        small, form_thread, json_thread = threads
        assert small[0] == form_thread[0] == "_of_form"
        assert not small[1].startswith("memtool-decode")
        assert form_thread[1].startswith("memtool-decode")
        assert json_thread[0] == "_of_json"
        assert json_thread[1].startswith("memtool-decode")

        def bug(*_: Any) -> None:
            raise ZeroDivisionError("a secret")

        monkeypatch.setattr(apps, "_of_form", bug)
        broken = at.send(("a.png", picture))
        well = at.ask("/healthz")
        assert (broken.status, broken.json["error"]["code"]) == (500, "internal-server-error")
        assert "secret" not in broken.text
        names = ("content-security-policy", "x-content-type-options", "cache-control")
        assert [broken.headers[n] for n in names] == [well.headers[n] for n in names]
