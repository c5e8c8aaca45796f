"""Several processes that serve one memory: what is told to one of them reaches all.

Each keeps its own models and batches. One `Agreement`, which may run anywhere, holds the version
that all serve. A replica tells it at short intervals what it serves and what it measured, and takes
up what it hears; so does one that begins later. Where the agreement is lost and begun anew, it
learns the version from the first that tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette.exceptions import HTTPException

from memtool.serving.limits import Limits
from memtool.serving.metrics import by_replica
from memtool.serving.models import Models
from memtool.serving.service import LOOK_SECONDS, Service

logger = logging.getLogger(__name__)

TELL_SECONDS = 0.5
"""How often a replica tells what it serves."""

SILENT_SECONDS = 10.0
"""A replica that told nothing for so long is gone."""


class Agreement:
    """Which version all replicas serve, and what each of them last told."""

    def __init__(self) -> None:
        self.version: str | None = None
        self._told: dict[str, tuple[float, str, bytes]] = {}

    async def agreed(self) -> str | None:
        """The version that all serve, None before the first has told."""
        return self.version

    async def tell(self, replica: str, version: str, measured: bytes) -> str:
        """What a replica serves, and its metrics; the version that it should serve."""
        self._told[replica] = time.monotonic(), version, measured
        self.version = self.version or version
        return self.version

    async def settle(self, known: str | None, version: str) -> bool:
        """Let all serve another version; False where it is not the known one that they serve."""
        if self.version not in (known, None):
            return False
        self.version = version
        return True

    async def behind(self) -> tuple[int, int]:
        """How many replicas serve another version than agreed, and how many there are."""
        heard = self._heard()
        return sum(version != self.version for _, version, _ in heard.values()), len(heard)

    async def measured(self) -> dict[str, bytes]:
        """The metrics of each replica."""
        return {replica: text for replica, (_, _, text) in self._heard().items()}

    def _heard(self) -> dict[str, tuple[float, str, bytes]]:
        late = time.monotonic() - SILENT_SECONDS
        self._told = {name: told for name, told in self._told.items() if told[0] >= late}
        return self._told


Ask = Callable[..., Awaitable[Any]]
"""`ask(method, *arguments)` of the agreement."""


class Replica(Service):
    """A service that serves what all replicas agreed on."""

    def __init__(self, models: Models, limits: Limits, *, name: str, ask: Ask) -> None:
        super().__init__(models, limits)
        self.name = name
        self._ask = ask
        self._agreeing = asyncio.Lock()
        """Held from when this replica asks what is agreed until it serves it, or says another."""

    def always(self) -> list[Coroutine[Any, Any, None]]:
        """As the base, and the talk with the others."""
        return [*super().always(), self._follow()]

    async def reload(self) -> tuple[str, str]:
        """As the base, and returns when all replicas serve the version.

        Raises HTTPException where some do not in the time of a request; they go on trying.
        """
        first = self.models.current.version
        async with self._agreeing:
            while True:
                known = await self._ask("agreed")
                _, now = await super().reload()
                if await self._ask("settle", known, now):
                    break
        try:
            async with asyncio.timeout(self.limits.timeout):
                while (await self._ask("behind"))[0]:
                    await asyncio.sleep(TELL_SECONDS / 2)
        except TimeoutError as error:
            late, count = await self._ask("behind")
            raise HTTPException(
                504, f"{late} of {count} replicas do not serve version {now} yet; they try again"
            ) from error
        return first, now

    async def look(self) -> None:
        """As the base; a version that was found is for all."""
        try:
            async with self._agreeing:
                known, before = await self._ask("agreed"), self.models.current.version
                await super().look()
                if self.models.current.version != before:
                    await self._ask("settle", known, self.models.current.version)
        except Exception as error:  # noqa: BLE001 - whatever is wrong there, this replica goes on
            logger.warning("the agreement of the replicas does not answer: %r", error)

    async def measured(self) -> bytes:
        """The metrics of all replicas, each with its name as a label."""
        others: Mapping[str, bytes] = await self._ask("measured")
        return by_replica({**others, self.name: self.metrics.text()})

    async def _follow(self) -> None:
        taking: asyncio.Task[None] | None = None
        try:
            while True:
                here = self.models.current.version
                try:
                    wanted = await self._ask("tell", self.name, here, self.metrics.text())
                except Exception as error:  # noqa: BLE001 - it may be begun anew meanwhile
                    logger.warning("the agreement of the replicas does not answer: %r", error)
                    wanted = here
                if wanted != here and (taking is None or taking.done()):
                    taking = asyncio.create_task(self._take_up())
                await asyncio.sleep(TELL_SECONDS)
        finally:
            if taking is not None:
                taking.cancel()

    async def _take_up(self) -> None:
        """Serve the version agreed on; where that fails, a while until it is tried again."""
        async with self._agreeing, self._reloading:
            try:
                wanted = await self._ask("agreed")
                before, now = await self.models.reload(wanted)
            except Exception as error:  # noqa: BLE001 - what is served goes on, and it is tried again
                self.watching = self.models.told(error)
                self.metrics.reloaded("failed")
                logger.warning("the version agreed on is not taken up: %s", self.watching)
            else:
                self.watching = None
                if before != now:
                    self._taken_up(before, now)
                return
        await asyncio.sleep(LOOK_SECONDS)
