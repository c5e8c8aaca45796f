"""A Ray cluster (extra `ray`): one that runs, or one of this machine for as long as a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from memtool.errors import ConfigError
from memtool.settings import EngineSettings
from memtool_stores.printable import shown

LOCAL = "local"
"""The address of a cluster that is started here, and ends with the command."""

STORE_BYTES = 512_000_000
"""What a cluster that is started here may hold of objects larger than a message."""


def require_ray(part: str) -> Any:
    """The module `ray.<part>`, "serve" or "tune". Raises ConfigError where Ray lacks it."""
    try:
        return import_module(f"ray.{part}")
    except ImportError as error:
        raise ConfigError(
            f"--ray needs a package that is not here: {error.name or error}",
            remedy="pip install 'memtool[ray]'",
        ) from error


@contextmanager
def connected(address: str, *, cpus: int = 0) -> Iterator[Any]:
    """Ray, connected to the cluster at an address until the block ends.

    `LOCAL` is the one that `RAY_ADDRESS` names, else one that is started with as many CPUs as the
    machine has, `cpus` at least. Raises ConfigError where no cluster answers.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", LOCAL) if address == LOCAL else address
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", **own)
    except Exception as error:  # of a start that took too long, Ray raises no other
        raise ConfigError(
            f"no Ray cluster at {shown(address)}: {' '.join(str(error).split())[:300]}",
            expected="HOST:PORT of a cluster's head, or auto for one that runs on this machine",
            remedy="ray start --head begins one; --ray alone needs none",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def resources(engine: EngineSettings) -> tuple[int, int]:
    """CPUs and GPUs of the connected cluster that one process of work is counted with."""
    import ray

    wants_gpu = engine.device == "cuda" or (
        engine.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1
    )
    return engine.threads or 1, int(wants_gpu)
