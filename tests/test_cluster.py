"""What is said of a Ray cluster before any work is given to it."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest

from memtool import cluster
from memtool.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("cpu=2", {"cpu": 2.0}),
        ("cpu=2, gpu=0.5,tpu=1", {"cpu": 2.0, "gpu": 0.5, "tpu": 1.0}),
    ],
)
def test_resources_are_numbers_by_name(text: str | None, found: dict[str, float]) -> None:
    assert cluster.resources(text) == found


@pytest.mark.parametrize(
    "text", ["cpu", "cpu=", "=2", "cpu=-1", "cpu=inf", "cpu=nan", "gpu=1,gpu=1"]
)
def test_other_resources_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--resources"):
        cluster.resources(text)


@pytest.mark.parametrize(
    ("asked", "there", "device", "threads", "found"),
    [
        ({}, {}, "auto", None, {"cpu": 1, "gpu": 0}),
        ({}, {"GPU": 8}, "auto", 4, {"cpu": 4, "gpu": 1}),
        ({}, {"GPU": 8}, "cpu", None, {"cpu": 1, "gpu": 0}),
        ({}, {}, "cuda", None, {"cpu": 1, "gpu": 1}),
        ({"gpu": 0.5, "big": 1}, {"GPU": 8}, "auto", None, {"cpu": 1, "gpu": 0.5, "big": 1}),
    ],
)
def test_work_reserves_what_it_uses_unless_it_is_said(
    asked: dict[str, float],
    there: dict[str, float],
    device: str,
    threads: int | None,
    found: dict[str, float],
) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: there)
    assert cluster.reserved(asked, ray, device=device, threads=threads) == found


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="not here: ray") as found, cluster.joined("auto"):
        pass
    assert "pip install 'memtool[ray]'" in str(found.value.remedy)


@pytest.mark.parametrize("address", ["", "nonsense", "host:", ":6379", "host:70000", "ray://host"])
def test_what_is_no_address_is_refused_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(ConfigError, match="--ray") as found, cluster.joined(address):
        pass
    assert "HOST:PORT" in str(found.value.expected)


def test_where_nobody_listens_is_said_before_ray_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for one in (address, f"ray://{address}"):
            with pytest.raises(ConfigError, match="nobody answers there"), cluster.joined(one):
                pass


@pytest.mark.parametrize("named", [True, False])
def test_a_named_cluster_that_refuses_may_ask_for_a_token(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ConnectionError("Failed to connect")

    errors = SimpleNamespace(RayError=KeyError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=refuses, exceptions=errors))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match="Failed to connect") as found, cluster.joined("auto"):
        pass
    assert ("RAY_AUTH_MODE=token" in str(found.value.remedy)) == named


def test_what_a_cluster_has_too_little_of_is_said() -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0, "big": 1.0})
    assert cluster.lacks({"cpu": 2, "gpu": 0, "big": 1}, ray) == []
    (said,) = cluster.lacks({"cpu": 1, "gpu": 0.5}, ray)
    assert said.startswith("the cluster has 0 gpu now, and 0.5 are needed")
