"""One memory being served: its models, the batches that they answer, and what is measured."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from memtool.backbones.answering import chat_tokens
from memtool.errors import ConfigError, MemtoolError
from memtool.inference.predictor import Predictor
from memtool.methods.attached import AttachedTexts
from memtool.serving.batcher import Batcher, Work
from memtool.serving.guard import GONE, busy, gone
from memtool.serving.images import PictureRunner
from memtool.serving.limits import Limits
from memtool.serving.metrics import Metrics
from memtool.serving.models import Model, Models
from memtool.serving.texts import PromptRunner

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often --watch looks for a new version."""

LARGE_BYTES = 256 * 1024
"""A body from which on parsing takes longer than to hand it to another thread."""

T = TypeVar("T")


class Service:
    """What the routes of an app work on."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.admitted = 0
        """Inputs of requests that are not answered yet."""
        self.metrics = Metrics(lambda: self.admitted)
        self.metrics.serves(models.current.version)
        runner: Any = (
            PromptRunner(self.metrics)
            if models.reads == "texts"
            else PictureRunner(self.metrics, limits.batch)
        )
        self.batcher: Batcher[Any] = Batcher(
            runner, window=limits.window, most=limits.batch, batched=self.metrics.batch
        )
        self._decoders = ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), thread_name_prefix="memtool-decode"
        )
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="memtool-encode")
        self.reloading = asyncio.Lock()
        """Held while another version is taken up."""
        self.watching: str | None = None
        """What keeps a new version from being taken up by itself, where anything does."""

    @asynccontextmanager
    async def running(self, app: object) -> AsyncIterator[None]:
        """While the app runs. What waits at the end is answered."""
        del app
        self.batcher.start()
        tasks = [asyncio.create_task(one) for one in self.beside()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(self.batcher.stop)
            for pool in (self._decoders, self._encoder):
                pool.shutdown(wait=False, cancel_futures=True)
            self.models.close()

    def beside(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the requests until the end."""
        return [self._watch()] if self.limits.watch else []

    async def measured(self) -> bytes:
        """What Prometheus reads."""
        return self.metrics.text()

    def require(self, reads: str) -> None:
        """Raise ConfigError where the memory reads the other kind."""
        if self.models.reads != reads:
            other = "texts" if reads == "images" else "images"
            raise ConfigError(
                f"this memory reads {other}, not {reads}",
                remedy="/v1/predict" if other == "images" else "/v1/generate or /v1/completions",
            )

    async def parsed(self, parse: Callable[[bytes], T], body: bytes) -> T:
        """What a body holds: a large one is parsed aside, so that it holds nobody up."""
        if len(body) < LARGE_BYTES:
            return parse(body)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, parse, body)

    async def decode(self, model: Model, encoded: bytes, where: str) -> Any:
        """The pixels of one image file. Raises DataError."""
        assert isinstance(model.ready, Predictor)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, model.ready.pixels, encoded, where)

    async def encode(self, model: Model, asked: str | Sequence[dict[str, str]]) -> Tensor:
        """The token ids (1, n) of a prompt, or of a conversation. Raises DataError, ConfigError."""
        assert isinstance(model.ready, AttachedTexts)
        lm = model.ready.backbone

        def tokens() -> Tensor:
            return lm.encode([asked]).tokens if isinstance(asked, str) else chat_tokens(lm, asked)

        return await asyncio.get_running_loop().run_in_executor(self._encoder, tokens)

    def admit(self, count: int) -> None:
        """Count so many inputs in. Raises HTTPException for more than may be in at once."""
        if count > self.limits.queue:
            raise HTTPException(413, f"{count} inputs: a request has {self.limits.queue} at most")
        if self.admitted + count > self.limits.queue:
            raise busy(f"{self.admitted} inputs wait to be answered (--queue)")
        self.admitted += count

    @asynccontextmanager
    async def room_for(self, count: int) -> AsyncIterator[None]:
        """Room for so many inputs while they are answered, in the time that a request has.

        Raises HTTPException where there is none, and when the time is over.
        """
        self.admit(count)
        try:
            async with asyncio.timeout(self.limits.timeout):
                yield
        except TimeoutError as error:
            raise HTTPException(504, f"no answer in {self.limits.timeout:g} s") from error
        finally:
            self.admitted -= count

    async def answered(self, request: Request, works: Sequence[Work]) -> list[Any]:
        """The results of works of a request whose body has been read.

        Raises HTTPException when the client has gone, and what running them raised.
        """
        self.batcher.put(works)
        away = asyncio.ensure_future(gone(request.receive))
        futures = [work.future for work in works]
        together = asyncio.gather(*futures) if len(works) > 1 else futures[0]
        together.add_done_callback(_seen)  # also where nobody waits for it any more
        try:
            await asyncio.wait((together, away), return_when=asyncio.FIRST_COMPLETED)
            if not together.done():
                raise HTTPException(GONE, "the client has gone")
            return list(together.result()) if len(works) > 1 else [together.result()]
        finally:
            away.cancel()
            for work in works:  # also those of which another one failed
                if not work.future.done():
                    work.drop()
            together.cancel()

    def start(self, works: Sequence[Work]) -> None:
        """Let works be run whose results are streamed; each is counted until it has ended.

        Raises HTTPException as `admit`.
        """
        self.admit(len(works))

        def leave(_: object) -> None:
            self.admitted -= 1

        for work in works:
            work.future.add_done_callback(leave)
        self.batcher.put(works)

    async def reload(self) -> tuple[str, str]:
        """Take up the newest version: the one before, and the one served now.

        Raises what keeps it from being served; the version before goes on then.
        """
        async with self.reloading:
            return await self.take_up()

    async def take_up(self) -> tuple[str, str]:
        """As `reload`, by whoever has the lock `reloading`."""
        try:
            before, now = await self.models.reload()
        except (MemtoolError, OSError):
            self.metrics.reloaded("failed")
            raise
        if before != now:
            self._taken_up(before, now)
        return before, now

    async def look(self, version: str | None = None) -> None:
        """Take a version up, else the newest, by whoever has the lock; or know what is wrong."""
        before, known = self.models.current.version, self.watching
        self.watching = await self.models.look(version)
        if self.watching is not None and self.watching != known:
            self.metrics.reloaded("failed")
            logger.warning("version %s goes on being served: %s", before, self.watching)
        if self.models.current.version != before:
            self._taken_up(before, self.models.current.version)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            async with self.reloading:
                await self.look()

    def _taken_up(self, before: str, now: str) -> None:
        self.metrics.reloaded("ok")
        self.metrics.serves(now)
        logger.info("version %s is served in place of %s", now, before)


def _seen(done: asyncio.Future[Any]) -> None:
    """Look at how something ended, so that nobody is told that nobody did."""
    if not done.cancelled():
        done.exception()
