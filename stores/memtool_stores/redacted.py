"""Text on its way to a person or a file, without what gives access: keys, passwords, signatures."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

from memtool_stores.printable import one_line

HIDDEN = "[hidden]"

_SECRET_VARIABLE = re.compile(
    r"ACCESS_KEY|SECRET|PASSWORD|PASSWD|(?:^|_)TOKEN$|API_KEY$", re.IGNORECASE
)
_SHORTEST_SECRET = 8
"""A shorter value of a variable may be a word of the text by chance."""

_LONG = r"[^\s\"'&<>,;()\[\]{}]+"
_PATTERNS = (
    # https://user:password@host, and a password that holds an @ itself
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s\"'<>?#]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    # what a signed address carries
    (
        re.compile(
            r"((?:\b(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId"
            rf"|Credential)|[?&](?:sig|token|access_token))=){_LONG}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # AWS_SECRET_ACCESS_KEY=…, aws_session_token: "…", <AWSAccessKeyId>…, SecretAccessKey = …
    (
        re.compile(
            r"((?:access_?key(?:_?id)?|secret_?(?:access_?)?key|session_?token|security_?token"
            r"|password)[\"']?(?:\s*[=:]\s*|>)(?:Some\()?[\"']?)"
            rf"{_LONG}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(r"(\b(?:x-amz-security-token|authorization)[\"']?\s*:\s*).+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    # key ids and tokens that are known by their shape
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bhf_[A-Za-z0-9]{20,}\b"), HIDDEN),
)


def redacted(text: str) -> str:
    """The text with every secret in it replaced by `[hidden]`.

    Secrets are the values of this process's variables that are named for one (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `…_TOKEN`, `…PASSWORD…`), the user and password of
    an address, the signature of a signed one, and keys that are known by their shape.
    """
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def said(text: str) -> str:
    """The text as an error says it: one printable line, without secrets, whatever a file put in."""
    return one_line(redacted(text))


def _secrets() -> list[str]:
    """Secret values as they stand and as they stand in an address, the longest first."""
    values = {
        form
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name)
        for form in (value, quote(value, safe=""), quote(value))
    }
    return sorted(values, key=len, reverse=True)
