"""The app as a deployment of Ray Serve (extra `ray`): replicas on a cluster, one memory.

Every replica opens the memory by its address and has models and batches of its own; Ray's proxies
listen on the port and hand requests to replicas. A deployment beside them holds the version that
all serve (`replicas.Agreement`).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from memtool import clusters
from memtool.engine import Engine
from memtool.errors import BusyError, ConfigError, MemtoolError
from memtool.memory import Memory, load
from memtool.paths import split_store
from memtool.serving.app import create_app
from memtool.serving.limits import Limits
from memtool.serving.models import Models, name_of
from memtool.serving.replicas import Agreement, Replica
from memtool.serving.run import GRACE_SECONDS
from memtool.streams.images import quiet_decoders
from memtool_stores.printable import printable

SPARE_REQUESTS = 100
"""Requests of a replica beyond its inputs that wait: of who asks how it is, or is refused."""


@dataclass(frozen=True)
class Served:
    """A memory as a machine of the cluster opens it: by its address, perhaps with @VERSION.

    `overrides` are settings by dotted key that count before what the memory remembers.
    """

    store: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the memory is called."""
        return name_of(split_store(self.store)[0])

    def opened(self, version: str | None = None) -> Memory:
        """A version of it, else that which the address names. Raises the errors of `load`."""
        address, ref = split_store(self.store)
        memory = load(f"{address}@{version or ref}", overrides=self.overrides)
        memory.config.limits.put_in_force()
        return memory

    def models(self, version: str | None = None) -> Models:
        """Its models, with a version of it that answers. Raises the errors of `Models`."""
        config = self.opened(version).config
        engine = Engine(config.engine, threads=1 if config.backbone.name == "nano" else None)
        return Models(
            self.store,
            opened=self.opened,
            version=version,
            precision=engine.precision,
            device=str(engine.device),
        )


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are; up to `most`, where that is more, as requests come in.

    Then there are as many that each has about a batch of requests in flight.
    """

    least: int
    most: int

    def options(self, limits: Limits) -> dict[str, Any]:
        """As Ray Serve says it."""
        if self.most == self.least:
            return {"num_replicas": self.least}
        return {
            "autoscaling_config": {
                "min_replicas": self.least,
                "initial_replicas": self.least,
                "max_replicas": self.most,
                "target_ongoing_requests": limits.batch,
            }
        }


class Memtool:
    """A process that serves; the version that the others serve, where there are any."""

    async def __init__(self, served: Served, limits: Limits, agreement: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        from ray.serve import get_replica_context

        async def ask(method: str, *given: Any) -> Any:
            return await getattr(agreement, method).remote(*given)

        models = served.models(await ask("agreed"))
        own = get_replica_context().replica_id.unique_id
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_decoders())
        self._made = create_app(Replica(models, limits, name=own, ask=ask))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray asks for it once, after the above."""
        return self._made


def serve(
    served: Served,
    limits: Limits,
    replicas: Replicas,
    *,
    cluster: str,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered, in the time that they have.

    `ready` is called with the version once requests are answered. Raises BusyError where the
    cluster serves something else there, MemtoolError for what a replica could not do.
    """
    ray_serve = clusters.require_ray("serve")
    memory = served.opened()  # what is wrong with it is said before anything starts
    cpus = (memory.config.engine.threads or 1) * replicas.most
    name = f"memtool-{served.name}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with clusters.connected(cluster, cpus=cpus):
        there = set(ray_serve.status().applications)
        if name in there:
            raise BusyError(
                f"the cluster serves {printable(name)} already",
                expected="a memory that it does not serve yet",
                remedy="end the command that serves it; or serve shutdown, which ends all of them",
            )
        _listen(ray_serve, host, port)
        try:
            _deploy(ray_serve, name, served, limits, replicas, memory)
            _until_told(lambda: ready(memory.version))
        finally:
            ray_serve.delete(name)
            if not there:
                ray_serve.shutdown()


def _listen(ray_serve: Any, host: str, port: int) -> None:
    """Let the cluster's proxies listen. Raises BusyError where they do elsewhere."""
    from ray.serve.context import _get_global_client

    ray_serve.start(http_options={"host": host, "port": port})
    found = _get_global_client().http_config
    if (found.host, found.port) != (host, port):
        raise BusyError(
            f"Ray Serve listens on {found.host}, port {found.port} of this cluster, and not on "
            f"{host}, port {port}",
            expected="the same place for all that the cluster serves",
            remedy=f"--host {found.host} --port {found.port}",
        )


def _deploy(
    ray_serve: Any, name: str, served: Served, limits: Limits, replicas: Replicas, memory: Memory
) -> None:
    cpus, gpus = clusters.resources(memory.config.engine)
    agreement = ray_serve.deployment(Agreement).options(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    deployment = ray_serve.deployment(ray_serve.ingress()(Memtool)).options(
        max_ongoing_requests=limits.queue + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=limits.timeout + GRACE_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **replicas.options(limits),
    )
    try:
        ray_serve.run(deployment.bind(served, limits, agreement.bind()), name=name, route_prefix="/")
    except ray_serve.exceptions.RayServeException as error:
        raise ConfigError(
            f"the cluster cannot serve {printable(name)}: {' '.join(str(error).split())[:500]}"
        ) from error
    except RuntimeError as error:
        raise MemtoolError(
            f"no replica could serve the memory: {_reason(ray_serve, name) or _end(str(error))}",
            remedy="memtool of this version, the store and the model on every machine "
            "of the cluster; ray logs has more",
        ) from error


def _reason(ray_serve: Any, name: str) -> str:
    """What the replicas of an application say that did not start, "" for nothing."""
    found = ray_serve.status().applications.get(name)
    said = [one.message for one in found.deployments.values()] if found is not None else []
    return next((_end(text) for text in said if text.strip()), "")


def _end(text: str) -> str:
    """What an error of another machine ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1][:500]) if lines else "no reason was given"


def _until_told(ready: Callable[[], None]) -> None:
    """Return when SIGTERM or SIGINT comes."""
    told = threading.Event()
    ends = (signal.SIGINT, signal.SIGTERM)
    before = {one: signal.signal(one, lambda *_: told.set()) for one in ends}
    try:
        ready()
        told.wait()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
