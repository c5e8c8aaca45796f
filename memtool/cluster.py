"""A Ray cluster that work is given to: how it is joined, and what a piece of work has of it.

Work begins in the folder that the command was started in, where the machine has it, with the
command's own variables `MEMTOOL_…`, but for the key of a service.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from memtool.errors import ConfigError
from memtool_stores.printable import shown

LOCAL = "local"
"""The address of a cluster that is started here, and ends with the command."""

ADDRESSES = "auto (the cluster of this machine), HOST:PORT, ray://HOST:PORT, or local (one here)"

CONNECT_SECONDS = 10.0

SECRET = ("MEMTOOL_API_KEY",)
"""Variables that stay here."""


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """The package `ray`, connected to a cluster for as long as the block runs.

    `address` is one of `ADDRESSES`. Raises ConfigError where Ray is not installed, or no cluster
    can be joined there. Inside, what is printed goes to stderr.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise needs_ray(error) from error
    _require_listener(address)
    own = {name: value for name, value in os.environ.items() if name.startswith("MEMTOOL_")}
    given: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(
            address,
            runtime_env={"env_vars": {n: v for n, v in own.items() if n not in SECRET}},
            logging_level=logging.CRITICAL,
            log_to_driver=False,
            **given,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"--ray {shown(address)}: {said[0]}", expected=ADDRESSES, remedy=_remedy(address)
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # where Ray says what befell workers
            yield ray
    finally:
        ray.shutdown()


def needs_ray(error: ImportError) -> ConfigError:
    """The error for a package that `--ray` needs and that is not here."""
    return ConfigError(
        f"--ray needs a package that is not here: {error.name or 'a part of ray'}",
        remedy="pip install 'memtool[ray]', here and on every machine of the cluster",
    )


def _require_listener(address: str) -> None:
    """Raise ConfigError for no address, and for one where nobody listens: Ray waits minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", LOCAL):
        return
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--ray {shown(address)}", expected=ADDRESSES)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"--ray {shown(address)}: nobody answers there: {error.strerror or error}",
            expected=ADDRESSES,
            remedy=_remedy(address),
        ) from error


def _remedy(address: str) -> str:
    if address == LOCAL:
        return "`ray start --head` says more; then --ray auto"
    if address == "auto" and "RAY_ADDRESS" not in os.environ:
        return "`ray start --head` on this machine, or the address of a cluster elsewhere"
    return "`ray status` there says what runs; RAY_AUTH_MODE=token here, where it asks for a token"


def begin_in(folder: str) -> None:
    """Work in the folder in which the command was started, where this machine has it."""
    with suppress(OSError):
        os.chdir(folder)


def resources(text: str | None) -> dict[str, float]:
    """What a piece of work reserves: `"cpu=2,gpu=0.5"` as numbers by name; `cpu`, `gpu`, or own.

    Raises ConfigError for anything else.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, said = (word.strip() for word in part.partition("="))
        number = math.nan
        with suppress(ValueError):
            number = float(said)
        if not name or not 0 <= number < math.inf or name in found:
            raise ConfigError(
                f"--resources {shown(text or '')}", expected="cpu=2,gpu=0.5: each name once"
            )
        found[name] = number
    return found


def reserved(
    asked: Mapping[str, float], ray: Any, *, device: str, threads: int | None
) -> dict[str, float]:
    """What a piece of work reserves on a joined cluster: what was asked for, else what it uses.

    Else the CPUs are the `threads` of the engine, or one; and one GPU for the device cuda, and for
    auto where the cluster has any: without one, a piece of work sees none.
    """
    gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return {"cpu": float(threads or 1), "gpu": float(gpu), **asked}


def lacks(each: Mapping[str, float], ray: Any) -> list[str]:
    """In words, what a piece of work reserves and a joined cluster has too little of now."""
    there = {name.lower(): count for name, count in ray.cluster_resources().items()}
    return [
        f"the cluster has {has:g} {name} now, and {count:g} are needed: it is waited for more"
        for name, count in each.items()
        if (has := there.get(name.lower(), 0.0)) < count
    ]
