"""What every request passes first: host, origin, key, size, time; and what every answer says.

A page that a browser loaded from elsewhere can send requests to a service on this machine, also
under a name of its own that points here (DNS rebinding): so the host that is asked for, and the
origin of the page, are looked at.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memtool.serving.errors import refusal
from memtool.serving.limits import BODIES, Limits

logger = logging.getLogger(__name__)

OPEN = ("/", "/healthz")
"""Paths that need no key, and those below /page/: they tell nothing of what was learned."""

RETRY_SECONDS = 1

GONE = 499
"""The status, in the metrics, of a request whose client hung up."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Of every answer."""

_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_NAMES = frozenset(name for name, _ in _HEADERS)


class Guard:
    """An ASGI app around another: it refuses what may not pass.

    `measured(path, status, seconds)` is told of every answer.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, measured: Callable[[str, int, float], None]
    ) -> None:
        self._app, self._limits, self._measured = app, limits, measured
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks over websockets
            return await send({"type": "websocket.close", "code": 1000})
        began, status, started = time.monotonic(), 500, False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                own = [one for one in message.get("headers", ()) if one[0] not in _NAMES]
                message["headers"] = own + _HEADERS
            await send(message)

        body = _Body(self, receive)
        try:
            self._require(scope)
            await self._app(scope, body.receive, answer)
        except HTTPException as error:
            await refusal(error)(scope, receive, answer)
        except ClientDisconnect:  # in the middle of its body: nobody is there to be told
            status = GONE
        except Exception as error:
            logger.exception("%s failed: %r", scope["path"], error)
            if started:  # nothing else can be said in the middle of an answer
                raise
            unforeseen = HTTPException(500, "an error that nobody foresaw; the log has it")
            await refusal(unforeseen)(scope, receive, answer)
        finally:
            self._held -= body.size
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._measured(path, status, time.monotonic() - began)
        return None

    def _require(self, scope: Scope) -> None:
        """Raise HTTPException for a request that may not pass."""
        headers, limits = Headers(scope=scope), self._limits
        host = headers.get("host", "")
        if limits.hosts is not None and _name(host) not in limits.hosts:
            raise HTTPException(421, "this service is not called by that host name")
        origin = headers.get("origin")
        if origin is not None and origin not in limits.origins:
            own = (f"http://{host}", f"https://{host}")
            if not host or origin.lower() not in (one.lower() for one in own):
                raise HTTPException(403, "pages of that origin may not ask (--cors)")
        path = scope["path"]
        if limits.key is not None and path not in OPEN and not path.startswith("/page/"):
            given = headers.get("authorization", "")
            kind, _, key = given.partition(" ")
            right = hmac.compare_digest(key.strip().encode(), limits.key.encode())
            if kind.lower() != "bearer" or not right:
                raise HTTPException(
                    401,
                    "the API key is missing or wrong: Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
        stated = headers.get("content-length", "0")
        if stated.isascii() and stated.isdigit() and int(stated[:20]) > limits.body:
            raise too_large(limits.body)

    def hold(self, size: int) -> None:
        """Room for more bytes of bodies. Raises HTTPException where too many are held."""
        if self._held + size > BODIES * self._limits.body:
            raise busy("too many large requests at once")
        self._held += size

    @property
    def limits(self) -> Limits:
        """What is allowed."""
        return self._limits


class _Body:
    """The body of one request, as it comes in: counted, and in time."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._end = time.monotonic() + guard.limits.timeout
        self._whole = False
        self.size = 0

    async def receive(self) -> Message:
        """The next part. Raises HTTPException for what is too large, or too slow."""
        if self._whole:  # what may still come is that the client has gone
            return await self._receive()
        limits = self._guard.limits
        try:
            async with asyncio.timeout(max(self._end - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"no whole request in {limits.timeout:g} s") from error
        if message["type"] != "http.request":
            return message
        count = len(message.get("body", b""))
        if self.size + count > limits.body:
            raise too_large(limits.body)
        self._guard.hold(count)
        self.size += count
        self._whole = not message.get("more_body", False)
        return message


def too_large(most: int) -> HTTPException:
    """The error for a body of more than so many bytes."""
    return HTTPException(413, f"a request of more than {most:,} bytes (--max-body)")


def busy(why: str) -> HTTPException:
    """The error for what can be asked again a little later."""
    return HTTPException(503, why, {"Retry-After": str(RETRY_SECONDS)})


async def gone(receive: Callable[[], Any]) -> None:
    """Return when the client has hung up; the body must have been read."""
    with suppress(RuntimeError):  # of a server that has closed the connection by itself
        while (await receive())["type"] != "http.disconnect":
            pass


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()
