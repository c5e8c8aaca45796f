"""Replicas agree on one version, however it comes to one of them, and add up their metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from memtool.serving import replicas as module
from memtool.serving.limits import Limits
from memtool.serving.metrics import Metrics, by_replica
from memtool.serving.models import Models
from memtool.serving.replicas import Agreement, Replica
from memtool_stores import MemoryStore, StorageError
from tests.serving.conftest import Memory


class Away(Agreement):
    """An agreement that can be lost."""

    away = False

    async def ask(self, method: str, *given: Any) -> Any:
        await asyncio.sleep(0)
        if self.away:
            raise ConnectionError("it is gone")
        return await getattr(self, method)(*given)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas talk often."""
    monkeypatch.setattr(module, "TELL_SECONDS", 0.02)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


@asynccontextmanager
async def running(
    memory: Memory, agreement: Away, count: int = 2, **limits: Any
) -> AsyncIterator[list[Replica]]:
    """So many replicas, as an app runs them; they serve what the memory was before its newest."""
    before = MemoryStore.open(str(memory.store)).view("HEAD~2").version
    made = [
        Replica(
            Models(str(memory.store), version=before),
            Limits(**limits),
            name=f"r{number}",
            ask=agreement.ask,
        )
        for number in range(count)
    ]
    async with AsyncExitStack() as stack:
        for one in made:
            await stack.enter_async_context(one.running(None))
        await until(lambda: len(agreement._told) == count)
        yield made


async def until(said: Any, seconds: float = 20.0) -> None:
    """Return once it is so. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not said():
            await asyncio.sleep(0.01)


def versions(replicas: list[Replica]) -> list[str]:
    return [one.models.current.version for one in replicas]


def test_a_reload_of_one_returns_when_all_serve_the_version(memory: Memory) -> None:
    async def scene() -> None:
        agreement = Away()
        async with running(memory, agreement) as both:
            first = both[0].models.current.version
            assert versions(both) == [first, first]
            before, now = await both[1].reload()
            assert before == first != now
            assert versions(both) == [now, now]
            assert await agreement.behind() == (0, 2)
            assert agreement.version == now
            assert (await both[0].reload()) == (now, now)

    asyncio.run(scene())


def test_what_one_watches_for_reaches_the_others(memory: Memory) -> None:
    async def scene() -> None:
        agreement = Away()
        async with running(memory, agreement) as both:
            await both[0].look()
            now = both[0].models.current.version
            assert now == both[0].models.newest()
            await until(lambda: versions(both) == [now, now])

    asyncio.run(scene())


def test_one_that_cannot_take_it_up_is_named_and_tries_again(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        agreement = Away()
        async with running(memory, agreement, timeout=0.5) as both:
            first, opened = both[0].models.current.version, both[1].models._opened

            def broken(version: str) -> Any:
                raise StorageError(f"no answer of {memory.store}")

            both[1].models._opened = broken
            with pytest.raises(HTTPException, match="1 of 2 replicas do not serve version") as seen:
                await both[0].reload()
            assert seen.value.status_code == 504
            now = both[0].models.current.version
            assert versions(both) == [now, first]
            assert both[1].watching == "no answer of memory"  # without the place of the store
            both[1].models._opened = opened
            await until(lambda: versions(both) == [now, now])
            await until(lambda: both[1].watching is None)

    asyncio.run(scene())


def test_all_go_on_without_the_agreement_and_a_new_one_learns_from_them(memory: Memory) -> None:
    async def scene() -> None:
        agreement = Away()
        async with running(memory, agreement) as both:
            first = both[0].models.current.version
            agreement.away = True
            await both[0].look()  # is told that nobody answers, and waits
            await asyncio.sleep(0.1)
            assert versions(both) == [first, first]
            agreement.version, agreement._told = None, {}
            agreement.away = False
            await until(lambda: len(agreement._told) == 2)
            assert agreement.version == first
            assert await agreement.agreed() == first

    asyncio.run(scene())


def test_an_agreement_is_settled_from_what_was_known_and_forgets_who_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        agreement = Agreement()
        assert await agreement.agreed() is None
        assert await agreement.tell("a", "v1", b"") == "v1"
        assert await agreement.tell("b", "v0", b"") == "v1"
        assert await agreement.behind() == (1, 2)
        assert await agreement.settle("v1", "v2")
        assert not await agreement.settle("v1", "v3")  # another was first
        assert await agreement.agreed() == "v2"
        assert await agreement.behind() == (2, 2)
        monkeypatch.setattr(module, "SILENT_SECONDS", -1.0)
        assert await agreement.behind() == (0, 0)
        assert await agreement.measured() == {}

    asyncio.run(scene())


def test_metrics_are_those_of_all_with_a_label(memory: Memory) -> None:
    async def scene() -> str:
        agreement = Away()
        async with running(memory, agreement) as both:
            both[0].metrics.reloaded("ok")
            await until(lambda: b'result="ok"' in agreement._told["r0"][2])
            both[1].metrics.reloaded("failed")  # its own are those of now
            return (await both[1].measured()).decode()

    lines = [line for line in asyncio.run(scene()).splitlines() if "reloads_total{" in line]
    assert sorted(lines) == [
        'memtool_reloads_total{replica="r0",result="ok"} 1.0',
        'memtool_reloads_total{replica="r1",result="failed"} 1.0',
    ]


def test_metrics_of_one_are_as_they_were_but_for_the_label(memory: Memory) -> None:
    metrics = Metrics(lambda: 3)
    metrics.serves("V")
    metrics.reloaded("ok")
    own = metrics.text().decode().splitlines()
    named = by_replica({"a": metrics.text()}).decode().splitlines()
    assert len(named) == len(own)
    without = [
        line.replace('replica="a",', "").replace('{replica="a"}', "").replace(',replica="a"', "")
        for line in named
    ]
    assert sorted(without) == sorted(own)
