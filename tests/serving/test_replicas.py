"""Replicas of one memory serve one version, whichever of them is told of a new one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memtool.errors import BusyError, ConfigError, MemtoolError
from memtool.serving import replicas, service
from memtool.serving.limits import Limits
from memtool.serving.metrics import Metrics, side_by_side
from memtool.serving.replicas import Agreed, Count, Replica, Standing
from tests.cli.conftest import inside
from tests.serving.conftest import Memory
from tests.serving.served import FORM, Served, served

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grown(memory: Memory, tmp_path: Path) -> Memory:
    """A copy of the memory, which a test may change."""
    return memory.copy(tmp_path / "memory")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.02)


class Lost(Agreed):
    """An agreement that can be out of reach."""

    away = False

    async def agree(self, version: str) -> str:
        if self.away:
            raise BusyError("out of reach")
        return await super().agree(version)


async def until(there: Any) -> None:
    async with asyncio.timeout(30):
        while not there():
            await asyncio.sleep(0.01)


def serves(one: Replica) -> str:
    return one.models.current.version


# What is agreed ---------------------------------------------------------------------------------


def test_a_version_is_moved_by_who_knows_what_is_agreed() -> None:
    async def agreeing() -> None:
        agreed = Agreed()
        assert await agreed.version() is None
        assert await agreed.agree("one") == "one"
        assert await agreed.agree("two") == "one"
        assert await agreed.move("one", "three") == "three"
        assert await agreed.move("one", "two") == "three"  # it looked before the other moved it
        assert await agreed.version() == "three"

    asyncio.run(agreeing())


def test_who_says_nothing_or_leaves_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async def standing() -> None:
        agreed, clock = Agreed(), 100.0
        monkeypatch.setattr(replicas, "time", SimpleNamespace(monotonic=lambda: clock))
        for name in ("silent", "left", "well"):
            await agreed.beat(name, Standing("one", None, b""))
        await agreed.leave("left")
        clock += replicas.GONE_SECONDS - 1
        await agreed.beat("well", Standing("two", None, b""))
        assert set(await agreed.standings()) == {"silent", "well"}
        clock += 2
        found = await agreed.standings()
        assert {name: one.version for name, one in found.items()} == {"well": "two"}

    asyncio.run(standing())


def test_a_reload_of_one_reaches_all_and_what_cannot_be_served_reaches_none(grown: Memory) -> None:
    async def reloading() -> None:
        agreed, limits = Agreed(), Limits(key="a-key-of-tests")
        first, second = (Replica(grown.models(), limits, agreed, name) for name in ("a", "b"))
        old = serves(first)
        async with AsyncExitStack() as running:
            for one in (first, second):
                await running.enter_async_context(one.running(None))
            assert await first.reload() == (old, old)
            grown.method.write()  # and is not consolidated: nobody can serve it
            with pytest.raises(MemtoolError, match="3 adapters, and recalls 2"):
                await first.reload()
            assert (serves(first), serves(second), await agreed.version()) == (old, old, old)
            grown.method.consolidate()
            new = grown.method.workspace.store.view("HEAD").version
            assert await second.reload() == (old, new)
            assert serves(first) == serves(second) == new  # when it is answered, and not later
            late = Replica(grown.models("@HEAD~2"), limits, agreed, "late")
            assert serves(late) != new
            await running.enter_async_context(late.running(None))
            assert serves(late) == new  # before it answers anything
            text = (await first.measured()).decode()
            assert f'memtool_version{{replica="b",version="{new}"}} 1.0' in text
            assert 'memtool_reloads_total{replica="a",result="failed"} 1.0' in text
        assert await agreed.standings() == {}

    asyncio.run(reloading())


def test_one_that_cannot_serve_what_others_do_is_told_of(grown: Memory) -> None:
    async def failing() -> None:
        agreed, limits = Agreed(), Limits(key="a-key-of-tests")
        first, second = (Replica(grown.models(), limits, agreed, name) for name in ("a", "b"))
        old = serves(first)
        grown.method.write()
        grown.method.consolidate()

        def opened(version: str) -> Any:
            raise ConfigError(f"no room for {version}")

        second.models._opened = opened
        async with AsyncExitStack() as running:
            for one in (first, second):
                await running.enter_async_context(one.running(None))
            with pytest.raises(MemtoolError, match=r"1 of 2 replicas .* no room for"):
                await first.reload()
            assert serves(first) == await agreed.version() != old
            assert serves(second) == old
            assert "no room" in (second.watching or "")

    asyncio.run(failing())


def test_what_one_finds_by_itself_all_take_up_and_a_lost_agreement_is_made_again(
    grown: Memory,
) -> None:
    async def watching() -> None:
        agreed = Lost()
        first = Replica(grown.models(), Limits(watch=True), agreed, "a")
        second = Replica(grown.models(), Limits(), agreed, "b")  # is told, and does not look
        async with AsyncExitStack() as running:
            for one in (first, second):
                await running.enter_async_context(one.running(None))
            agreed.away = True
            await asyncio.sleep(0.1)
            agreed.away = False
            grown.method.write()
            grown.method.consolidate()
            new = grown.method.workspace.store.view("HEAD").version
            await until(lambda: serves(first) == serves(second) == new)
            agreed._version = None  # its process was started again
            await until(lambda: agreed._version == new)
            assert serves(first) == serves(second) == new

    asyncio.run(watching())


def test_metrics_of_replicas_stand_side_by_side() -> None:
    one, two = (Metrics(lambda: 2) for _ in range(2))
    one.answered({"a": 0.5})
    two.answered({"a": 0.25})
    two.request("/v1/predict", 200, 0.1)
    text = side_by_side({"x": one.text(), "y": two.text()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    use = {s.labels["replica"]: s.value for s in families["memtool_adapter_use"].samples}
    assert use == {"x": 0.5, "y": 0.25}
    assert families["memtool_request_seconds"].type == "histogram"
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))  # one group a metric, as the format asks


@pytest.mark.parametrize(
    ("replicas_", "autoscale", "found"),
    [(None, None, (1, 1)), (3, None, (3, 3)), (None, "1:4", (1, 4)), (None, "2:2", (2, 2))],
)
def test_how_many_replicas(
    replicas_: int | None, autoscale: str | None, found: tuple[int, int]
) -> None:
    count = Count.of(replicas_, autoscale)
    assert (count.least, count.most) == found


@pytest.mark.parametrize(
    ("replicas_", "autoscale"), [(2, "1:4"), (None, "4:1"), (None, "0:1"), (None, "4"), (None, "")]
)
def test_how_many_replicas_cannot_be(replicas_: int | None, autoscale: str) -> None:
    with pytest.raises(ConfigError, match="--autoscale"):
        Count.of(replicas_, autoscale)


@pytest.mark.parametrize("option", ["--replicas 2", "--autoscale 1:2", "--resources cpu=1"])
def test_options_of_a_cluster_need_one(option: str, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "user")}
    refused = inside(tmp_path, environment, "serve", *option.split())
    assert refused.returncode == 2
    assert f"{option.split()[0]} without --ray" in refused.stderr


# On a cluster -----------------------------------------------------------------------------------

KEY = "a-key-of-tests"


@contextmanager
def on_ray(memory: Memory, *more: str) -> Iterator[tuple[Served, subprocess.Popen[str]]]:
    """`memtool serve --ray local`; a signal ends it."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "stores")),
        "XDG_CONFIG_HOME": str(memory.folder / "user"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "MEMTOOL_API_KEY": KEY,
    }
    asked = ["serve", "--store", str(memory.store), "--port", "0", "-q", "--device", "cpu"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from memtool_cli.main import run; run()", *asked),
            *("--precision", "fp32", "--ray", "local", "--resources", "cpu=0.25", *more),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url
        yield Served(int(url.rpartition(":")[2]), None, KEY), process  # type: ignore[arg-type]
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_replicas_answer_as_one_process_and_take_a_version_up_without_a_lost_request(
    grown: Memory,
) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    files = [(f"{place}.png", picture) for place, picture in enumerate(grown.pictures)]
    with served(grown.models()) as alone:
        expected = alone.send(*files, topk="3").json
    with on_ray(grown, "--replicas", "2", "--max-body", "1") as (at, process):
        assert all(at.send(*files, topk="3").json == expected for _ in range(6))
        assert at.ask("/v1/predict", b"x" * 1_100_000, {"Content-Type": FORM}).status == 413
        assert at.ask("/metrics", headers={"Authorization": ""}).status == 401
        assert at.ask("/healthz", headers={"Host": "elsewhere.example"}).status == 421
        going = True

        def asking(file: tuple[str, bytes]) -> list[tuple[float, int, str]]:
            found = []
            while going:
                reply = at.send(file)
                found.append((time.monotonic(), reply.status, reply.json.get("version")))
            return found

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(asking, file) for file in files[:3]]
            try:
                grown.method.write()
                grown.method.consolidate()
                taken = at.ask("/reload", b"").json
                since = time.monotonic()
                time.sleep(2)
            finally:
                going = False
            answers = [answer for one in clients for answer in one.result()]
            old, new = expected["version"], grown.method.workspace.store.view("HEAD").version
            assert taken == {"version": new, "before": old, "changed": True}
            assert {status for _, status, _ in answers} == {200}
            assert {version for _, _, version in answers} == {old, new}
            # One more second is that of an answer that was begun before.
            assert {version for when, _, version in answers if when > since + 1} == {new}
            lines = [x for x in at.ask("/metrics").text.splitlines() if "memtool_version{" in x]
            assert len(lines) == 2
            assert all(new in line for line in lines)
            last = [pool.submit(partial(at.send, *files)) for _ in range(4)]
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert [one.result().status for one in last] == [200] * 4
        assert process.wait(120) == 0
