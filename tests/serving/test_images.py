"""A memory of images over HTTP: what it answers, refuses, and does while versions come and go."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memtool.errors import BusyError, ConfigError
from memtool.serving import service
from memtool.serving.limits import Limits
from memtool.serving.models import Model, Models
from memtool.serving.run import bound, hosts_of
from tests.cli.conftest import inside
from tests.serving.conftest import Memory
from tests.serving.served import FORM, LINE, Served, form, served

KEY = "a-key-for-the-tests"


def alone(model: Model, picture: bytes) -> tuple[str, float]:
    predictor: Any = model.ready
    (one,) = predictor.predict(np.stack([predictor.pixels(picture, "alone")]))
    return one.label, one.probability


@pytest.fixture(scope="module")
def models(memory: Memory) -> Models:
    return memory.models("@HEAD")


@pytest.fixture(scope="module")
def at(models: Models) -> Iterator[Served]:
    """A service with a key, whose requests may have 100 kB."""
    with served(models, key=KEY, body=100_000, origins=("https://good.example",)) as found:
        yield found


def test_files_of_a_form_are_answered_in_their_order(
    at: Served, models: Models, memory: Memory
) -> None:
    one, other = memory.pictures[:2]
    reply = at.send(("a.png", one), ("bröken.png", b"no image"), ("b.png", other), topk="3")
    assert reply.status == 200, reply.text
    assert reply.json["version"] == models.current.version
    first, broken, last = reply.json["predictions"]
    for found, picture, name in ((first, one, "a.png"), (last, other, "b.png")):
        label, probability = alone(models.current, picture)
        assert (found["file"], found["label"]) == (name, label)
        assert found["probability"] == pytest.approx(probability, abs=1e-5)
        assert found["classes"][0]["label"] == label
        assert len(found["classes"]) == 3
        assert sum(share["weight"] for share in found["weights"]) == pytest.approx(1, abs=1e-4)
        assert found["unlike"] in (True, False)
    assert broken["file"] == "bröken.png"
    assert broken["error"]["message"].startswith("bröken.png: not an image")
    assert "label" not in broken


def test_json_says_the_same_and_weights_are_all_of_them(at: Served, memory: Memory) -> None:
    text = base64.b64encode(memory.pictures[0]).decode()
    body = {"images": [text, {"image": f"data:image/png;base64,{text}", "file": "x"}]}
    found = at.ask("/v1/predict", body).json["predictions"]
    sent = at.send(("a.png", memory.pictures[0])).json["predictions"][0]
    assert [one["file"] for one in found] == ["image 1", "x"]
    for one in found:
        assert one["label"] == sent["label"]
        assert one["probability"] == pytest.approx(sent["probability"], abs=1e-5)
    told = at.ask("/v1/weights", body).json["predictions"][0]["weights"]
    assert {share["adapter"] for share in told} <= {"task-1-seed-0", "task-2-seed-0"}
    named = at.send(("a.png", memory.pictures[0]), model="task-2-seed-0").json["predictions"][0]
    assert [share["adapter"] for share in named["weights"]] == ["task-2-seed-0"]
    listed = [one["id"] for one in at.ask("/v1/models").json["data"]]
    assert listed == ["auto", "task-1-seed-0", "task-2-seed-0"]


def huge() -> bytes:
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


PICTURE = ("a.png", b"no image")
REFUSED: dict[str, tuple[str, bytes, str, int, str]] = {
    "broken JSON": ("/v1/predict", b'{"images":', "", 400, "no JSON"),
    "deep JSON": ("/v1/predict", b"[" * 50_000, "", 400, "no JSON"),
    "deep JSON elsewhere": ("/v1/completions", b"[" * 50_000, "", 400, "parsing"),
    "an array": ("/v1/predict", b"[]", "", 400, "object"),
    "an unknown key": ("/v1/predict", b'{"images":["QQ=="],"x":1}', "", 400, "x: Extra"),
    "no base64": ("/v1/predict", b'{"images":["?"]}', "", 400, "image 1 is no base64"),
    "no picture": ("/v1/predict", b'{"images":["QUJD"]}', "", 422, "image 1: not an image"),
    "only broken files": ("/v1/predict", form(PICTURE), FORM, 422, "a.png: not an image"),
    "no file": ("/v1/predict", form(model="auto"), FORM, 400, "the field `file`"),
    "a strange field": ("/v1/predict", form(PICTURE, who="me"), FORM, 400, "who: Extra"),
    "many fields": (
        "/v1/predict",
        form(PICTURE, **{f"f{n}": "" for n in range(40)}),
        FORM,
        400,
        "16 fields",
    ),
    "many files": ("/v1/predict", form(*[("", b"")] * 600), FORM, 413, "512 files"),
    "a cut form": ("/v1/predict", form(PICTURE)[:-30], FORM, 400, "in the middle"),
    "no form": ("/v1/predict", b"--x", FORM, 400, "cannot be read"),
    "a form without a line": ("/v1/predict", form(PICTURE), "multipart/form-data", 400, "boundary"),
    "another kind": ("/v1/predict", b"x", "text/plain", 415, "multipart/form-data"),
    "a large body": ("/v1/predict", b"x" * 200_000, FORM, 413, "100,000 bytes"),
    "20k x 20k": ("/v1/predict", form(("big.png", huge())), FORM, 422, "big.png: 20000 x 20000"),
    "an unknown model": ("/v1/predict", form(PICTURE, model="tusk-1"), FORM, 404, "'tusk-1'"),
    "another memory": ("/v1/predict", form(PICTURE, model="x@HEAD"), FORM, 404, "no model"),
    "an unknown version": ("/v1/predict", form(PICTURE, model="memory@x"), FORM, 404, "'x'"),
    "a version collected": (
        "/v1/predict",
        form(PICTURE, model="memory@0123456789ABCDEFGHJK"),
        FORM,
        410,
        "0123456789ABCDEFGHJK",
    ),
    "a long name": ("/v1/predict", form(PICTURE, model="x" * 999), FORM, 404, "999 characters"),
    "texts": ("/v1/completions", b'{"prompt":"x"}', "", 400, "reads images, not texts"),
    "a page that is not there": ("/page/../app.py", b"", "", 404, "Not Found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(at: Served, case: str) -> None:
    path, body, kind, status, said = REFUSED[case]
    reply = at.ask(path, body, {"Content-Type": kind or "application/json"})
    assert reply.status == status, reply.text
    assert said in reply.error
    assert at.ask("/healthz").json["status"] == "ok"


def test_a_version_is_asked_for_by_name(at: Served, memory: Memory, models: Models) -> None:
    store = models.current.memory.store
    before = store.view("HEAD~2").version
    reply = at.send(("a.png", memory.pictures[0]), model=f"memory@{before}")
    assert reply.json["version"] == before
    (share,) = reply.json["predictions"][0]["weights"]
    assert share["adapter"] == "task-1-seed-0"
    half = at.send(("a.png", memory.pictures[0]), model="memory@HEAD~1")  # written, no more
    assert half.status == 400
    assert half.json["error"]["remedy"] == "memtool consolidate"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "rebound.example"}, 421),
        ({"Host": "localhost:99"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://good.example"}, 200),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer a-key-for-the-test"}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": "Bearer schlüssel"}, 401),
    ],
    ids=str,
)
def test_who_may_ask(at: Served, headers: dict[str, str], status: int) -> None:
    reply = at.ask("/metrics", headers=headers)
    assert reply.status == status
    assert KEY not in reply.text
    allowed = headers.get("Origin") if headers.get("Origin") == "https://good.example" else None
    assert reply.headers.get("access-control-allow-origin") == allowed
    assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_a_body_without_a_length_is_counted(at: Served) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=30)
    headers = {"Content-Type": FORM, "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/predict", parts(), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_many_at_once_share_batches_and_none_is_mixed_up(
    at: Served, memory: Memory, models: Models
) -> None:
    expected = [alone(models.current, picture) for picture in memory.pictures]
    before = at.metric("memtool_batch_size_sum"), at.metric("memtool_batch_size_count")

    def ask(place: int) -> bool:
        picture = memory.pictures[place % len(expected)]
        (found,) = at.send(("a.png", picture)).json["predictions"]
        label, probability = expected[place % len(expected)]
        return found["label"] == label and abs(found["probability"] - probability) < 1e-4

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(96)))
    inputs = at.metric("memtool_batch_size_sum") - before[0]
    assert inputs == 96
    assert at.metric("memtool_batch_size_count") - before[1] < 48
    used = at.metric("memtool_adapter_use_total")
    assert used == pytest.approx(at.metric("memtool_inputs_total"), rel=1e-3)
    assert 0 <= at.metric("memtool_unlike_share") <= 1
    assert at.metric("memtool_queue") == 0


def test_queue_time_and_clients_that_hang_up(models: Models, memory: Memory) -> None:
    picture = ("a.png", memory.pictures[0])
    # The first of a batch waits for others much longer than anybody has time.
    with served(models, window=30.0, batch=3, queue=2, timeout=0.5) as at:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(at.send, picture)
            while at.metric("memtool_queue") < 1:
                time.sleep(0.01)
            full = at.send(picture, picture)
            assert (full.status, full.headers["retry-after"]) == (503, "1")
            assert first.result().status == 504
        assert at.send(*[picture] * 3).status == 413
        data = form(picture)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
        with socket.create_connection(("127.0.0.1", at.port)) as one:
            one.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            while at.metric("memtool_queue") < 1:
                time.sleep(0.01)
        while at.metric("memtool_queue"):
            time.sleep(0.01)
        text = at.ask("/metrics").text
        assert 'memtool_request_seconds_count{path="/v1/predict",status="499"} 1.0' in text
        with socket.create_connection(("127.0.0.1", at.port)) as slow:
            slow.sendall(f"{head}Content-Length: 50\r\n\r\n--{LINE}".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert at.metric("memtool_batch_size_count") == 0


def test_a_version_is_taken_up_and_no_request_is_lost(memory: Memory, tmp_path: Path) -> None:
    memory = memory.copy(tmp_path)
    models = memory.models()
    old = models.current
    with served(models, key=KEY) as at, ThreadPoolExecutor(8) as pool:
        going = True

        def ask(place: int) -> list[tuple[int, Any]]:
            found = []
            while going:
                index = (place + len(found)) % len(memory.pictures)
                found.append((index, at.send(("a.png", memory.pictures[index]))))
            return found

        asking = [pool.submit(ask, place) for place in range(8)]
        try:
            assert at.ask("/reload", b"").json["changed"] is False
            memory.method.write()
            failed = at.ask("/reload", b"")
            assert failed.status == 409
            assert failed.json["version"] == old.version
            assert "3 adapters, and recalls 2" in failed.error
            memory.method.consolidate()
            taken = at.ask("/reload", b"")
            assert taken.json["before"] == old.version
            assert taken.json["version"] == models.current.version != old.version
            time.sleep(0.3)
        finally:
            going = False
        answers = [answer for one in asking for answer in one.result()]
        new = models.current
        expected = {
            model.version: [alone(model, picture) for picture in memory.pictures]
            for model in (old, new)
        }
        assert at.metric("memtool_reloads_total") == 2
    assert len(answers) > 100
    seen = set()
    for index, reply in answers:
        assert reply.status == 200, reply.text
        version, (found,) = reply.json["version"], reply.json["predictions"]
        label, probability = expected[version][index]
        assert found["label"] == label
        assert found["probability"] == pytest.approx(probability, abs=1e-4)
        seen.add(version)
    assert seen == {old.version, new.version}


def test_new_versions_are_watched_for_and_a_store_may_disappear(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.05)
    models = memory.models("@served")  # a branch
    store = models.current.memory.store
    with served(models, watch=True) as at:
        assert at.ask("/reload", b"").status == 403  # nobody has a key
        before = models.current.version
        store.delete_branch("served")
        store.branch("served", "HEAD~2")
        while models.current.version == before:
            time.sleep(0.01)
        assert at.ask("/healthz").json["version"] == store.view("HEAD~2").version
        away = memory.store.with_name("away")
        memory.store.rename(away)
        try:
            while not (said := at.ask("/healthz").json["watch"]):
                time.sleep(0.01)
            assert str(memory.store) not in said
            assert at.send(("a.png", memory.pictures[0])).status == 200
            gone = at.send(("a.png", memory.pictures[0]), model="memory@HEAD")
            assert gone.status == 503
            assert str(memory.store) not in gone.text
        finally:
            away.rename(memory.store)
        while at.ask("/healthz").json["watch"]:
            time.sleep(0.01)


def test_requests_in_flight_are_answered_when_it_stops(models: Models, memory: Memory) -> None:
    with served(models, window=0.5) as at, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(at.send, ("a.png", memory.pictures[0]))
        while at.metric("memtool_queue") < 1:
            time.sleep(0.01)
        at.stop()
        assert asked.result().status == 200


def test_places_and_keys_that_cannot_be() -> None:
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BusyError, match=f"port {port} of 127.0.0.1 is in use"):
            bound("127.0.0.1", port)
        assert hosts_of("127.0.0.1", "127.0.0.1") == {"localhost", "127.0.0.1", "[::1]"}
    for host in ("203.0.113.7", "no such host"):
        with pytest.raises(ConfigError, match=host.replace(".", r"\.")):
            bound(host, 0)
    with bound("0.0.0.0", 0) as open_to_all:
        assert hosts_of("0.0.0.0", open_to_all.getsockname()[0]) is None
    for key in ("", "short", "with space in it", "schlüssel-schlüssel", "x" * 600, "line\r\nend-"):
        with pytest.raises(ConfigError) as found:
            Limits(key=key)
        assert not key or key not in str(found.value)
    for origin in ("*", "example.org", "https://a.example/path", "https://a.example\r\nx: y"):
        with pytest.raises(ConfigError, match="--cors"):
            Limits(origins=(origin,))


def test_the_verb_serves_until_it_is_told_to_stop(memory: Memory, tmp_path: Path) -> None:
    start = [sys.executable, "-c", "from memtool_cli.main import run; run()", "serve"]
    words = ["--store", str(memory.store), "--port", "0", "--json", "--debug"]
    environment = os.environ | {"MEMTOOL_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*start, *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["schema"] == "memtool.serve"
        at = Served(int(said["url"].rpartition(":")[2]), None, KEY)  # type: ignore[arg-type]
        assert at.send(("a.png", memory.pictures[0])).json["version"] == said["version"]
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert KEY not in out + err
    assert "stopped" in err


def test_what_the_verb_cannot_do(memory: Memory, tmp_path: Path) -> None:
    def memtool(*words: str) -> subprocess.CompletedProcess[str]:
        return inside(tmp_path, {"XDG_CONFIG_HOME": str(tmp_path)}, *words)

    with bound("127.0.0.1", 0) as taken:
        words = ("--store", str(memory.store), "--port", str(taken.getsockname()[1]))
        done = memtool("serve", *words)
    assert done.returncode == 4
    assert "is in use" in done.stderr
    done = memtool("serve", "--store", str(memory.store), "--port", "0", "--api-key", "secret")
    assert done.returncode == 2
    assert "secret" not in done.stderr.replace("'import secrets; print(secrets", "")
    assert memtool("serve", "--store", "nowhere").returncode == 3
