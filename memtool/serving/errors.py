"""Errors as answers: one form for all, that of OpenAI, which its clients read.

{"error": {"message", "type", "code", "param", "expected", "remedy"}}
"""

from __future__ import annotations

import http
from collections.abc import Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from memtool.errors import (
    BusyError,
    ConfigError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)
from memtool_stores import StorageError
from memtool_stores.errors import VersionExpiredError

Document = dict[str, Any]

STATUS: tuple[tuple[type[MemtoolError], int], ...] = (
    (VersionExpiredError, 410),
    (NotFoundError, 404),
    (ConfigError, 400),
    (MismatchError, 400),
    (DataError, 422),
    (BusyError, 503),
    (StorageError, 503),
)
"""The status of an error, that of the first class that fits; others are 500."""


def status_of(error: MemtoolError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def document(
    message: str,
    status: int,
    *,
    code: str | None = None,
    param: str | None = None,
    expected: str | None = None,
    remedy: str | None = None,
) -> Document:
    """One error as a document."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    said = {"message": message, "type": kind, "code": code, "param": param}
    return {"error": said | {"expected": expected, "remedy": remedy}}


def of_error(
    error: MemtoolError, hidden: Callable[[str], str], param: str | None = None
) -> Document:
    """An error of the library; `hidden` takes what clients need not know out of a text."""
    return document(
        hidden(error.message),
        status_of(error),
        code=error.code,
        param=param,
        expected=error.expected and hidden(error.expected),
        remedy=error.remedy and hidden(error.remedy),
    )


def refusal(error: HTTPException) -> JSONResponse:
    """The answer to a request that was refused."""
    code = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    found = document(str(error.detail), error.status_code, code=code)
    return JSONResponse(found, error.status_code, error.headers)


def invalid(errors: Sequence[Any]) -> JSONResponse:
    """The answer to a document that is none, or has values that cannot be: what pydantic said."""
    first = errors[0]
    place = ".".join(str(one) for one in first["loc"] if one != "body")
    broken = first["type"] == "json_invalid"
    why = first.get("ctx", {}).get("error", "") if broken else first["msg"]
    message = f"the body is no JSON: {why}" if broken else f"{place or 'the body'}: {why}"
    found = document(message, 400, code="json" if broken else "value", param=place or None)
    return JSONResponse(found, 400)
