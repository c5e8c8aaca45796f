"""A memory served by replicas on a Ray cluster, which agree on the version that they serve.

Each replica is the app of `memtool serve`, with models, batches and limits of its own, behind the
proxies of Ray Serve. Which version all of them serve is what an actor holds (`Agreed`). Every
replica looks there each second, and takes up what is agreed between two requests, as after a
reload. It is moved on by the replica that gets `/reload`, or finds a version as `--watch` says,
after that has made it ready itself: what cannot be served is never agreed on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from memtool import cluster
from memtool.errors import BusyError, ConfigError, MemtoolError
from memtool.serving.app import create_app
from memtool.serving.limits import Limits
from memtool.serving.metrics import side_by_side
from memtool.serving.models import Models
from memtool.serving.run import GRACE_SECONDS, bound, hosts_of, url_of
from memtool.serving.service import Service
from memtool.settings import Config
from memtool.streams.images import quiet_decoders

BEAT_SECONDS = 1.0
"""How often a replica says how it is, and looks at what is agreed."""

GONE_SECONDS = 10.0
"""After how long without a word a replica counts as gone."""

APP = "memtool"
"""The name of the application in Ray Serve, and of the namespace of the actor."""


# What is agreed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How a replica is: the version that it serves, one that it cannot and why, its metrics."""

    version: str
    failed: tuple[str, str] | None
    metrics: bytes


class Agreed:
    """The version that all replicas are to serve, and how each of them is.

    What is lost with its process is said again by the first replica that asks.
    """

    def __init__(self) -> None:
        self._version: str | None = None
        self._heard: dict[str, tuple[float, Standing]] = {}

    async def version(self) -> str | None:
        """What is agreed; None before anything was."""
        return self._version

    async def agree(self, version: str) -> str:
        """What is agreed: `version`, where nothing was."""
        self._version = self._version or version
        return self._version

    async def move(self, before: str, now: str) -> str:
        """Agree on `now`, unless another than `before` is agreed; what is agreed then."""
        if await self.agree(before) == before:
            self._version = now
        return await self.agree(now)

    async def beat(self, replica: str, standing: Standing) -> None:
        """A replica says how it is."""
        self._heard[replica] = time.monotonic(), standing

    async def leave(self, replica: str) -> None:
        """A replica ends."""
        self._heard.pop(replica, None)

    async def standings(self) -> dict[str, Standing]:
        """How each replica is that was heard of lately."""
        since = time.monotonic() - GONE_SECONDS
        self._heard = {name: one for name, one in self._heard.items() if one[0] >= since}
        return {name: standing for name, (_, standing) in self._heard.items()}


class Elsewhere(Agreed):
    """`Agreed` as an actor of Ray. Raises BusyError while that is out of reach."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def _ask(self, method: str, *given: Any) -> Any:
        from ray.exceptions import RayError

        try:
            return await getattr(self._actor, method).remote(*given)
        except RayError as error:
            raise BusyError("what the replicas agree on is out of reach now") from error

    async def version(self) -> str | None:
        """As the base."""
        return await self._ask("version")

    async def agree(self, version: str) -> str:
        """As the base."""
        return await self._ask("agree", version)

    async def move(self, before: str, now: str) -> str:
        """As the base."""
        return await self._ask("move", before, now)

    async def beat(self, replica: str, standing: Standing) -> None:
        """As the base."""
        await self._ask("beat", replica, standing)

    async def leave(self, replica: str) -> None:
        """As the base."""
        await self._ask("leave", replica)

    async def standings(self) -> dict[str, Standing]:
        """As the base."""
        return await self._ask("standings")


class Replica(Service):
    """One of several services of the same memory; `name` is its own."""

    def __init__(self, models: Models, limits: Limits, agreement: Agreed, name: str) -> None:
        super().__init__(models, limits)
        self.agreement, self.name = agreement, name

    @asynccontextmanager
    async def running(self, app: object) -> AsyncIterator[None]:
        """As the base; no request is answered before this serves what is agreed, or cannot."""
        with quiet_decoders(), suppress(BusyError):
            await self._follow_once()
            await self._beat_once()
        async with super().running(app):
            try:
                yield
            finally:
                with suppress(BusyError):
                    await self.agreement.leave(self.name)

    def beside(self) -> list[Coroutine[Any, Any, None]]:
        """As the base, and what keeps it in step."""
        return [*super().beside(), _each_beat(self._beat_once), _each_beat(self._follow_once)]

    async def _beat_once(self) -> None:
        models = self.models
        standing = Standing(models.current.version, models.failed, self.metrics.text())
        await self.agreement.beat(self.name, standing)

    async def _follow_once(self) -> None:
        async with self.reloading:
            serves = self.models.current.version
            agreed = await self.agreement.agree(serves)
            if agreed != serves:
                await super().look(agreed)

    async def look(self, version: str | None = None) -> None:
        """As the base; what is taken up is what all agree on from now on."""
        before = self.models.current.version
        with suppress(BusyError):
            agreed = await self.agreement.agree(before)
            await super().look(version)
            now = self.models.current.version
            if now != before:
                await self.agreement.move(agreed, now)

    async def reload(self) -> tuple[str, str]:
        """Take up the newest version, here and then everywhere; the one before, and that now.

        Raises what keeps it from being served here, and then nothing has changed; MemtoolError
        where a replica cannot serve it, or does not in the time of a request.
        """
        async with self.reloading:
            first = self.models.current.version
            agreed = await self.agreement.agree(first)
            while True:
                _, now = await self.take_up()
                found = await self.agreement.move(agreed, now)
                if found == now:
                    break
                agreed = found  # another replica was told, too: is its version the newer one?
        await self._everywhere(now)
        return first, now

    async def _everywhere(self, version: str) -> None:
        """Return when all replicas serve a version, or another one is agreed on."""
        until = time.monotonic() + self.limits.timeout
        while await self.agreement.agree(version) == version:
            others = (await self.agreement.standings()).items()
            behind = {k: one for k, one in others if k != self.name and one.version != version}
            if not behind:
                return
            failed = [one.failed for one in behind.values() if one.failed is not None]
            why = [text for tried, text in failed if tried == version]
            if why or time.monotonic() > until:
                raise MemtoolError(
                    f"{len(behind)} of {len(others)} replicas do not serve version {version}: "
                    + (why[0] if why else "they are not ready yet"),
                    expected="one version everywhere",
                    remedy="/metrics tells what each replica serves",
                )
            await asyncio.sleep(BEAT_SECONDS / 4)

    async def measured(self) -> bytes:
        """The metrics of all replicas, each with the label `replica`; of others as of last beat."""
        own = {self.name: self.metrics.text()}
        with suppress(BusyError):
            others = await self.agreement.standings()
            own = {name: one.metrics for name, one in sorted(others.items())} | own
        return side_by_side(own)


async def _each_beat(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        with suppress(BusyError):
            await step()


# On a cluster -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """How many replicas: from `least` to `most`, as many as there is work for."""

    least: int = 1
    most: int = 1

    @classmethod
    def of(cls, replicas: int | None, autoscale: str | None) -> Count:
        """What `--replicas N` or `--autoscale MIN:MAX` says. Raises ConfigError."""
        if autoscale is None:
            return cls(replicas or 1, replicas or 1)
        least, _, most = autoscale.partition(":")
        right = least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)
        if replicas is not None or not right:
            raise ConfigError(
                f"--autoscale {autoscale}" + " and --replicas" * (replicas is not None),
                expected="MIN:MAX as 1:4, without --replicas",
            )
        return cls(int(least), int(most))

    @property
    def text(self) -> str:
        """`4 replicas`, or `1 to 4 replicas`."""
        if self.most == 1:
            return "1 replica"
        return (
            f"{self.least} to {self.most} replicas"
            if self.most > self.least
            else f"{self.most} replicas"
        )

    def options(self, batch: int) -> dict[str, Any]:
        """As Ray Serve is told; another replica is begun where a batch would not hold them all."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        scale = {"min_replicas": self.least, "max_replicas": self.most}
        return {"autoscaling_config": {**scale, "target_ongoing_requests": batch}}


@dataclass(frozen=True)
class Fleet:
    """What is served: `opened(version)` are the models of a version, made anew on each replica.

    `config` is that of the memory; `resources` what a replica reserves, where it was said.
    """

    opened: Callable[[str | None], Models]
    config: Config
    limits: Limits
    count: Count
    resources: Mapping[str, float]


def serve_on_ray(
    fleet: Fleet,
    address: str,
    version: str,
    host: str,
    port: int,
    *,
    say: Callable[[str], None],
    ready: Callable[[Limits, str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered, in the time that they have.

    `version` is where it begins. `ready(limits, url)` is called once requests are answered. Raises
    ConfigError where there is no Ray, or no cluster at the address; BusyError where that serves
    something already; MemtoolError where no replica can begin, or others stop the service.
    """
    with cluster.joined(address) as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise cluster.needs_ray(error) from error
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        mine, http, hosts = _place(serve, host, port)
        limits = replace(fleet.limits, hosts=hosts)
        began = False
        with _until_told():
            own = uuid.uuid4().hex
            keeper = ray.remote(Agreed).options(
                name=own, namespace=APP, lifetime="detached", num_cpus=0, max_restarts=-1
            )
            actor = keeper.remote()
            try:
                ray.get(actor.agree.remote(version))
                if mine:
                    serve.start(http_options={"host": http[0], "port": http[1]})
                _deploy(ray, serve, replace(fleet, limits=limits), own, say)
                began = True
                ready(limits, url_of(*http))
                while APP in serve.status().applications:
                    time.sleep(BEAT_SECONDS)
                raise MemtoolError("another program has stopped the service")
            except KeyboardInterrupt:
                if not began:
                    raise
            finally:
                patience = limits.timeout + 2 * GRACE_SECONDS if began else 0.0
                _stop(ray, serve, actor, everything=mine, patience_seconds=patience)


def _deploy(ray: Any, serve: Any, fleet: Fleet, actor: str, say: Callable[[str], None]) -> None:
    """Begin the replicas, and return when they answer. Raises MemtoolError where they cannot."""
    home, limits, opened = str(Path.cwd()), fleet.limits, fleet.opened

    def app() -> FastAPI:
        return replica_app(opened, limits, actor, home)

    engine = fleet.config.engine
    each = cluster.reserved(fleet.resources, ray, device=engine.device, threads=engine.threads)
    all_of_them = {name: count * fleet.count.least for name, count in each.items()}
    for sentence in cluster.lacks(all_of_them, ray):
        say(sentence)
    others = {name: count for name, count in each.items() if name not in ("cpu", "gpu")}
    deployment = serve.deployment(
        serve.ingress(app)(MemoryReplica),
        **fleet.count.options(limits.batch),
        max_ongoing_requests=limits.queue,
        max_queued_requests=limits.queue,
        graceful_shutdown_timeout_s=limits.timeout + GRACE_SECONDS,
        ray_actor_options={
            "num_cpus": each["cpu"],
            "num_gpus": each["gpu"],
            "resources": others,
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        serve.run(deployment.bind(), name=APP, route_prefix="/")
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise MemtoolError(
            f"no replica can begin: {_why(serve, error)}",
            expected="a cluster whose machines see the store, and have this memtool",
            remedy="the replicas' logs, in logs/serve of the folder of Ray's session, say more",
        ) from error


def _why(serve: Any, error: Exception) -> str:
    """The last line of what a replica failed of; else of the error itself."""
    app = serve.status().applications.get(APP)
    said = [one.message for one in app.deployments.values()] if app is not None else []
    lines = [line.strip() for text in said for line in text.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or str(error).strip().splitlines() or [type(error).__name__])[-1]


class MemoryReplica:
    """What Ray Serve makes a replica of: it has the app of `replica_app`, and nothing else."""


def replica_app(
    opened: Callable[[str | None], Models], limits: Limits, actor: str, home: str
) -> FastAPI:
    """The app of one replica, in its process: of the version that is agreed on."""
    import ray
    from ray import serve

    cluster.begin_in(home)
    agreed = ray.get_actor(actor, namespace=APP)
    models = opened(ray.get(agreed.version.remote()))
    name = serve.get_replica_context().replica_id.unique_id
    return create_app(Replica(models, limits, Elsewhere(agreed), name))


def _place(serve: Any, host: str, port: int) -> tuple[bool, tuple[str, int], frozenset[str] | None]:
    """Whether Serve is still to be begun, where it listens, and the names it is called by there.

    Raises BusyError, ConfigError where that is not what was asked for.
    """
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        with bound(host, port) as listening:
            at = listening.getsockname()
            return True, (host, int(at[1])), hosts_of(host, at[0])
    there = running.http_config
    for name, app in serve.status().applications.items():
        if name == APP or getattr(app, "route_prefix", None) == "/":
            raise BusyError(
                f"the cluster serves {name} already",
                expected="a cluster without it",
                remedy="`serve shutdown` ends all that it serves, with RAY_AUTH_MODE=token where "
                "the cluster asks for a token",
            )
    if (there.host, there.port) != (host, port):
        raise ConfigError(
            f"Ray Serve of this cluster listens at {there.host}:{there.port}, not {host}:{port}",
            remedy=f"--host {there.host} --port {there.port}",
        )
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    return False, (host, port), hosts_of(host, str(address))


def _stop(ray: Any, serve: Any, actor: Any, *, everything: bool, patience_seconds: float) -> None:
    """End the replicas when what they were asked is answered; Serve too, where it was begun."""
    until = time.monotonic() + patience_seconds
    with suppress(Exception):  # the cluster may be gone, or the app never have begun
        serve.delete(APP, _blocking=False)
        while time.monotonic() < until and APP in serve.status().applications:
            time.sleep(BEAT_SECONDS / 4)
    with suppress(Exception):
        ray.kill(actor)
    if everything:
        with suppress(Exception):
            serve.shutdown()


@contextmanager
def _until_told() -> Iterator[None]:
    """The first SIGTERM or SIGINT interrupts the block; a second one does not wait."""
    before: dict[int, Any] = {}

    def told(*_: object) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        raise KeyboardInterrupt

    before |= {one: signal.signal(one, told) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
