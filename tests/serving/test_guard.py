"""The guard of a service, around an app of its own."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from memtool.serving.guard import GONE, Guard
from memtool.serving.limits import Limits


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    messages = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []
    statuses: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, Limits(hosts=None), lambda path, status, seconds: statuses.append(status))
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    with caplog.at_level(logging.WARNING):
        asyncio.run(guard(scope, receive, send))
    assert statuses == [GONE]
    assert not sent
    assert not caplog.records


def test_a_key_is_not_shown_where_limits_are() -> None:
    assert "secret" not in repr(Limits(key="secret-of-one"))
    assert Limits(key="secret-of-one") != Limits(key="secret-of-two")
