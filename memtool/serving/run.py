"""An app on a port, until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from memtool.errors import BusyError, ConfigError
from memtool.serving.app import create_app
from memtool.serving.limits import Limits
from memtool.serving.models import Models
from memtool.serving.service import Service
from memtool.streams.images import quiet_decoders
from memtool_stores.printable import shown

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

BACKLOG = 1024
GRACE_SECONDS = 5.0
"""What requests in flight have beyond their own time when the service stops."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises BusyError for a port in use, ConfigError for a place that is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {shown(host)}: {error}", expected="a name or address of this machine"
        ) from error
    family, kind, _, _, address = found[0]
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} of {host} is in use",
                expected="a port that no other process listens on",
                remedy="--port 0 takes a free one",
            ) from error
        raise ConfigError(
            f"nothing can listen on port {port} of {shown(host)}: {error.strerror}",
            expected="an address of this machine, and a port above 1023",
        ) from error
    listening.setblocking(False)
    return listening


def address_of(listening: socket.socket) -> str:
    """The URL under which a socket is reached."""
    return url_of(*listening.getsockname()[:2])


def url_of(host: str, port: int) -> str:
    """The URL of a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_of(host: str, address: str) -> frozenset[str] | None:
    """The names that a service is called by at the address of a host.

    None, any, where others can reach it.
    """
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return None
    name = f"[{host}]" if ":" in host else host
    own = f"[{address}]" if ":" in address else address
    return LOOPBACK | {name.lower(), own}


def serve(
    models: Models, limits: Limits, listening: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered, in the time that they have.

    `ready` is called once requests are answered.
    """
    server = Server(models, limits, ready)
    # uvicorn raises the signal again when all is done; that is no reason to die.
    before = {one: signal.signal(one, _nothing) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with quiet_decoders():
            server.run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class Server(uvicorn.Server):
    """The server of one memory; `should_exit` ends it when what is in flight is answered."""

    def __init__(self, models: Models, limits: Limits, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(Service(models, limits)),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=int(limits.timeout + GRACE_SECONDS),
        )
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As the base, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()


def _nothing(*_: object) -> None:
    """A signal that has been seen to."""
