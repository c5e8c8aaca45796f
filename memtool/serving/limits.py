"""What a service allows: how it batches, what it refuses, and whom it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from memtool.errors import ConfigError
from memtool_stores.printable import shown

MB = 1_000_000
BODIES = 8
"""Bodies of the largest size that are held at once."""

_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:.]+\](:\d{1,5})?", re.I)


@dataclass(frozen=True)
class Limits:
    """The options of a service.

    window      seconds that the first request of a batch waits for others
    batch       inputs of a batch at most
    body        bytes of a request
    queue       inputs that wait to be answered
    timeout     seconds until a request is given up
    key         what a client must know; None: everybody is answered, and nobody may reload
    origins     pages of other hosts that may ask
    hosts       the names that the service is called by; None: any
    watch       whether new versions are taken up by themselves

    Raises ConfigError for a key or an origin that none can be.
    """

    window: float = 0.005
    batch: int = 64
    body: int = 32 * MB
    queue: int = 512
    timeout: float = 60.0
    key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})
    watch: bool = False

    def __post_init__(self) -> None:
        if self.key is not None and not _KEY.fullmatch(self.key):
            raise ConfigError(
                "the API key cannot be used",
                expected="8 to 512 visible ASCII characters, no spaces",
                remedy="python -c 'import secrets; print(secrets.token_urlsafe())' makes one",
            )
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors {shown(origin)}",
                    expected="the origin of a page, as https://example.org or http://localhost:3000",
                )
