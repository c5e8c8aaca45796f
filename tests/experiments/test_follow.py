"""Runs that are followed: the same curves in every service, none of which can hold a run up."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from memtool.config import resolve
from memtool.errors import ConfigError, MemtoolError, NotFoundError
from memtool.evaluation.record import Record, read_record, write_record
from memtool.experiments.follow import Said
from memtool.experiments.queue import Queue
from memtool.experiments.run import run
from memtool.experiments.runs import Runs, find_all, runs
from memtool.trackers import SERVICES, Card, Points, require_services
from memtool.trackers.csv_file import CsvFile
from memtool.trackers.sending import following
from tests.cli.conftest import inside
from tests.conftest import no_pages

ROOT = Path(__file__).parents[2]
SMALL = {
    "stream.order": "upright,inverted",
    "stream.train_per_task": 20,
    "stream.test_per_task": 10,
    "train.epochs": 2,
    "train.batch_size": 10,
    "baselines": "none",
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


def card(folder: Path, **more: object) -> Card:
    settings = {"train.lr": 0.01, "stream.order": ["a", "b"], "stream.held_out": None}
    about = {"name": "first-seed-0", "group": "first", "settings": settings} | more
    return Card(folder=folder / "seed-0", shared=folder, note="a note", tags=("one",), **about)  # type: ignore[arg-type]


# Every service ----------------------------------------------------------------------------------

SENT = {
    "loss/task 1 of 2 up - adapt": [[1, 0.75], [2, 0.5]],
    "accuracy/seen": [[1, 1.0], [2, 0.5]],
    "weights/up/task-1": [[2, 0.25]],
}

PROGRAM = """
import json, os, socket, sys
from pathlib import Path

asked = []
def only_here(connect):
    def checked(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(str(address))
            raise OSError("no network")
        return connect(self, address, *rest)
    return checked
def resolved(host, *rest, **more):
    if host not in ("127.0.0.1", "::1", "localhost", None, ""):
        asked.append(str(host))
        raise OSError("no network")
    return found(host, *rest, **more)
found, socket.getaddrinfo = socket.getaddrinfo, resolved
socket.socket.connect = only_here(socket.socket.connect)

import logging
from memtool.trackers import Card
from memtool.trackers.sending import following

warned = []
class Heard(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("memtool").addHandler(Heard(logging.WARNING))

name, sent = sys.argv[1], json.loads(sys.argv[2])
here = Path.cwd()
card = Card(
    "first-seed-0", "first", {"train.lr": 0.01, "stream.order": ["a", "b"]}, here / "seed-0", here,
    "a note", ("one",),
)

def follow(services):
    with following(services, card, patience_seconds=150) as send:
        for curve, points in sent.items():
            for step, value in points:
                axis = "step" if curve.startswith("loss") else "tasks"
                send({curve: value}, step=step, axis=axis)

follow([name])
print("printed by whoever", end="")
"""

READ = {
    "csv": """
import csv
kept = {}
for line in csv.DictReader(open("seed-0/curves.csv")):
    kept.setdefault(line["name"], []).append([int(line["step"]), float(line["value"])])
said = None
""",
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator("tensorboard/first-seed-0")
events.Reload()
kept = {c: [[e.step, e.value] for e in events.Scalars(c)] for c in events.Tags()["scalars"]}
text = lambda tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
said = [text("note"), text("tags"), "train.lr" in text("settings")]
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("memtool: first").experiment_id])
kept = {
    curve: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, curve)]
    for curve in run.data.metrics
}
tags = run.data.tags
lr = run.data.params["train.lr"]
said = [tags["mlflow.note.content"], "one" if "tag.one" in tags else "", lr == "0.01"]
assert run.info.status == "FINISHED" and run.info.run_name == "first-seed-0"
os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
follow(["csv", "mlflow"])
assert Path("seed-0/curves.csv").read_text().count("\\n") == 6
(unreachable,) = warned
assert "log service mlflow failed" in unreachable and "the run goes on" in unreachable, warned
warned.clear()
""",
    "wandb": """
from wandb.proto import wandb_internal_pb2
(file,) = Path("wandb").glob("offline-run-*/run-*.wandb")
data, place, whole, parts, kept, said = file.read_bytes(), 7, [], b"", {}, None
while place + 7 <= len(data):  # the log of LevelDB: blocks of 32 KiB, records in pieces
    if place % 32768 > 32768 - 7:
        place += 32768 - place % 32768
        continue
    size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
    parts += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
        whole.append(parts)
        parts = b""
for packed in whole:
    record = wandb_internal_pb2.Record()
    record.ParseFromString(packed)
    if record.HasField("run"):
        run = record.run
        keys = [item.key for item in run.config.update]
        said = [run.notes, ",".join(run.tags), "train.lr" in keys]
    if record.HasField("history"):
        items = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        for curve, value in items.items():
            if not curve.startswith(("_", "axis/")):
                axis = "axis/step" if curve.startswith("loss") else "axis/tasks"
                kept.setdefault(curve, []).append([items[axis], value])
""",
    "trackio": """
from trackio.sqlite_storage import SQLiteStorage
kept = {}
for line in SQLiteStorage.get_logs("first", "first-seed-0"):
    for curve in sent:
        if curve in line:
            kept.setdefault(curve, []).append([line["step"], line[curve]])
config = SQLiteStorage.get_run_config("first", "first-seed-0")
said = [config["note"], config["tags"], config["train.lr"] == 0.01]
""",
}


SLOW_TO_START = ("mlflow", "wandb", "trackio")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_START else name
        for name in SERVICES
    ],
)
def test_every_service_has_the_same_curves_and_asks_no_network(name: str, tmp_path: Path) -> None:
    package = SERVICES[name].package
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + READ[name] + END, name, json.dumps(SENT)],
        cwd=tmp_path,
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join(
                [*(str(ROOT / part) for part in ("", "cli", "stores")), *sys.path]
            ),
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.removeprefix("printed by whoever"))
    assert whole["warned"] == []
    assert whole["asked"] == []
    assert whole["kept"] == SENT
    assert whole["said"] == (None if name == "csv" else ["a note", "one", True])


END = """
print(json.dumps({"kept": kept, "said": said, "asked": asked, "warned": warned}))
sys.stdout.flush()
"""


def test_the_name_of_a_run_is_no_path(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(MemtoolError, match="victim"):
        Said(name="../../victim")
    from memtool.trackers.tensorboard import TensorBoard

    with pytest.raises(MemtoolError, match="victim"):
        TensorBoard().begin(card(tmp_path, name="../../victim"))


def test_services_that_are_not_there_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert require_services(["csv", "csv"]) == ("csv",)
    with pytest.raises(ConfigError, match="tensorbord") as raised:
        require_services(["tensorbord"])
    assert raised.value.expected is not None
    assert "did you mean 'tensorboard'" in raised.value.expected
    monkeypatch.setattr("memtool.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as missing:
        require_services(["wandb"])
    assert missing.value.remedy == "pip install 'memtool[wandb]'"


class Breaks:
    """A service that fails at the first number, as one does whose disk is full."""

    def begin(self, card: Card) -> str:
        return "nowhere"

    def log(self, points: Iterable[Points]) -> None:
        raise OSError("no space\nleft")

    def end(self, *, failed: bool) -> None:
        raise AssertionError


class Hangs(Breaks):
    """A service that never answers."""

    def __init__(self, released: threading.Event) -> None:
        self._released = released

    def begin(self, card: Card) -> str:
        self._released.wait()
        return "nowhere"


def test_a_service_that_breaks_or_hangs_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    trackers = {"wandb": Breaks(), "mlflow": Hangs(released), "csv": CsvFile()}
    with following(
        ["csv"], card(tmp_path), open_service=trackers.__getitem__, patience_seconds=30
    ) as send:
        send({"loss/a": 1.0}, step=1, axis="step")
    import memtool.trackers.sending as sending

    senders = [
        sending._Sender(name, card(tmp_path), trackers.__getitem__, lambda _: None)
        for name in ("wandb", "mlflow")
    ]
    for sender in senders:
        sender.start()
        sender.put(Points({"loss/a": 1.0}, 1, "step", 0.0))
        sender.close(failed=False)
    senders[0].wait(30)
    senders[1].wait(0.05)
    released.set()
    senders[1].join(30)
    first, second, *_ = [record.getMessage() for record in caplog.records]
    assert "log service wandb failed (OSError: no space left); the run goes on" in first
    assert "log service mlflow did not answer in time" in second
    assert (tmp_path / "seed-0" / "curves.csv").read_text().endswith('step,1,"loss/a",1.0\n')


# A whole run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record, Record]:
    """A run that is followed, and the same with another rate of learning that is not."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, lr, more in (
        ("first", 0.01, {"log": ("csv",), "said": Said("first", "a note", ("paper", "paper"))}),
        ("second", 0.02, {}),
    ):
        place = {"runs": str(folder / name), "store": str(folder / name / "memory")}
        config = resolve(overrides={**SMALL, **place, "train.lr": lr}, ambient=False).config
        with no_pages():
            found += run(config, **more)  # type: ignore[arg-type]
    return folder, found[0], found[1]


def curves(file: Path) -> dict[str, list[tuple[str, int, float]]]:
    found: dict[str, list[tuple[str, int, float]]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            point = (line["axis"], int(line["step"]), float(line["value"]))
            found.setdefault(line["name"], []).append(point)
    return found


def test_a_run_sends_loss_accuracy_drift_and_weights(two: tuple[Path, Record, Record]) -> None:
    folder, record, _ = two
    found = curves(folder / "first" / "seed-0" / "curves.csv")
    for number, task in ((1, "upright"), (2, "inverted")):
        loss = found[f"loss/task {number} of 2 {task} - adapt"]
        assert [(axis, step) for axis, step, _ in loss] == [("step", n) for n in (1, 2, 3, 4)]
    row = record.row("memory")
    assert found["accuracy/inverted"] == [
        ("tasks", step, scores[1])
        for step, scores in enumerate(row.accuracy)
        if scores[1] is not None
    ]
    seen = [step for _, step, _ in found["accuracy/seen"]]
    assert seen == [1, 2]
    assert found["accuracy/seen"][-1][2] == pytest.approx(row.metrics["faa"])
    ((axis, step, degrees),) = found["keys/drift_degrees"]
    assert (axis, step) == ("tasks", 2)
    assert 0 <= degrees <= 180
    assert [step for _, step, _ in found["weights/upright/task-1-seed-0"]] == [1, 2]
    weights = [found[f"weights/upright/task-{n}-seed-0"][-1][2] for n in (1, 2)]
    assert sum(weights) == pytest.approx(1, abs=1e-5)  # softmax
    assert found["metric/faa"] == [("tasks", 2, row.metrics["faa"])]
    assert "routed/accuracy/inverted" in found


@pytest.mark.usefixtures("no_page")
def test_following_changes_nothing_and_a_run_that_goes_on_adds_to_its_curves(
    two: tuple[Path, Record, Record], tmp_path: Path
) -> None:
    folder, record, _ = two
    config = resolve(file=folder / "first" / "seed-0" / "record.json", ambient=False).config
    place = {"runs": tmp_path / "again", "store": str(tmp_path / "memory")}
    (alone,) = run(config.model_copy(update=place))
    assert [row.accuracy for row in alone.metrics.rows] == [
        row.accuracy for row in record.metrics.rows
    ]
    assert [row.metrics for row in alone.metrics.rows] == [
        row.metrics for row in record.metrics.rows
    ]


def test_what_is_said_of_a_run_is_in_its_record_and_a_record_without_it_is_as_before(
    two: tuple[Path, Record, Record], tmp_path: Path
) -> None:
    _, first, second = two
    assert (first.run.name, first.run.note, first.run.tags) == ("first", "a note", ("paper",))
    plain = [one.model_copy(update={"inside": None}) for one in two[1:]]
    written = [json.loads(write_record(one, tmp_path / "r.json").read_text()) for one in plain]
    assert written[0]["schema_version"] == 4
    assert {"name", "note", "tags"} & written[1]["run"].keys() == set()
    assert read_record(write_record(first, tmp_path / "r.json")) == first
    assert second.run.tags == ()


# Runs -------------------------------------------------------------------------------------------


def test_runs_are_found_compared_and_become_a_frame(
    two: tuple[Path, Record, Record], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, first, second = two
    found = runs(folder)
    assert [one.record for one in found] == [first, second]
    assert found.differences() == {"train.lr": [0.01, 0.02]}
    assert found[0].label == "first seed 0"
    assert found[1].label == f"{folder}/second/seed-0"
    frame = found.to_pandas()
    assert list(frame["train.lr"]) == [0.01, 0.02]
    assert list(frame["final_average"]) == [one.row("memory").metrics["faa"] for one in two[1:]]
    assert list(frame["metric.faa"]) == list(frame["final_average"])
    assert list(frame["tags"]) == ["paper", ""]
    drawn = found.plot(tmp_path / "runs.svg").read_text(encoding="utf-8")
    assert "first seed 0" in drawn
    assert found.plot(tmp_path / "again.svg").read_text(encoding="utf-8") == drawn
    with pytest.raises(ConfigError, match=r"runs\.pdg"):
        found.plot(tmp_path / "runs.pdg")
    with pytest.raises(NotFoundError, match="nowhere"):
        runs(tmp_path / "nowhere")
    damaged = tmp_path / "damaged" / "seed-0"
    damaged.mkdir(parents=True)
    (damaged / "record.json").write_text("{")
    write_record(first, tmp_path / "damaged" / "seed-1" / "record.json")
    assert len(runs(tmp_path / "damaged")) == 1
    assert "record.json is not JSON" in caplog.text


def test_folders_of_memories_and_queues_hold_no_runs(tmp_path: Path) -> None:
    for place in ("a/seed-0", "memory/ice", "memory", "sweep/queue/x", "sweep/cells/x/seed-0"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "record.json").write_text("{}")
    (tmp_path / "memory" / "record.json").unlink()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    queue = Queue(tmp_path / "sweep" / "queue", lease_seconds=60)
    with queue.claim("x") or pytest.fail("free") as lease:
        assert lease.publish({"record": "cells/x/seed-0"})
    places = [file.parent.relative_to(tmp_path).as_posix() for file in find_all(tmp_path)]
    assert places == ["a/seed-0", "sweep/cells/x/seed-0"]
    assert len(Runs([])) == 0


def test_the_verb_lists_compares_and_draws(
    two: tuple[Path, Record, Record], tmp_path: Path
) -> None:
    folder, first, _ = two
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    memtool = partial(inside, folder, environment)
    listed = memtool("runs", ".", "--diff", "--plot", str(tmp_path / "runs.png"))
    assert listed.returncode == 0, listed.stderr
    header, *lines = (line.split("\t") for line in listed.stdout.splitlines())
    assert header == ["run", "seed", "train.lr", "final average"]
    assert [line[:3] for line in lines] == [
        ["first/seed-0", "0", "0.01"],
        ["second/seed-0", "0", "0.02"],
    ]
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    whole = json.loads(memtool("runs", "first", "second", "--json").stdout)
    assert [one["differs"] for one in whole["runs"]] == [{"train.lr": 0.01}, {"train.lr": 0.02}]
    assert whole["runs"][0]["final_average"] == first.row("memory").metrics["faa"]
    assert memtool("runs", ".", "--tag", "paper", "-q").stdout == "first/seed-0\n"
    assert memtool("runs", ".", "--match", "second/*", "-q").stdout == "second/seed-0\n"
    assert "note" in memtool("runs", ".").stdout.splitlines()[0]
    nothing = memtool("runs", "nowhere")
    assert nothing.returncode == 3
    assert "memtool run" in nothing.stderr
    refused = memtool("run", "--log", "tensorbord", "--set", "runs=x")
    assert refused.returncode == 2
    assert not (folder / "x").exists()


# Seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("0..4", (0, 1, 2, 3, 4)),
        ("0,1,2", (0, 1, 2)),
        ("0..1,7", (0, 1, 7)),
        (["0", "3..4"], (0, 3, 4)),
        (["0,1"], (0, 1)),
        ("[1, 2]", (1, 2)),
        (5, (5,)),
        ("5..5", (5,)),
    ],
)
def test_seeds_are_lists_and_ranges(given: object, seeds: tuple[int, ...]) -> None:
    assert resolve(overrides={"seed": given}, ambient=False).config.seed == seeds


@pytest.mark.parametrize("given", ["4..0", "0..10000", "0..99999999999"])
def test_a_range_that_falls_or_is_a_slip_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"command line: the range .*\.\."):
        resolve(overrides={"seed": given}, ambient=False)


def test_only_what_services_print_is_kept_from_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Talks:
        def begin(self, card: Card) -> str:
            print("a service began")
            return "nowhere"

        def log(self, points: Iterable[Points]) -> None:
            print("a service took points")

        def end(self, *, failed: bool) -> None:
            print("a service ended")

    caplog.set_level("INFO", "memtool.trackers")
    before = sys.stdout
    with (
        following(("csv",), card(tmp_path), open_service=lambda _: Talks()) as send,
        following(("csv",), card(tmp_path), open_service=lambda _: Talks()),
    ):
        print("the program")
        other = threading.Thread(target=print, args=("another thread",))
        other.start()
        other.join()
        assert sys.stdout.isatty() == before.isatty()
        send({"loss": 1.0}, step=1, axis="step")
    assert sys.stdout is before
    assert capsys.readouterr().out.splitlines() == ["the program", "another thread"]
    said = [record.message for record in caplog.records]
    assert said.count("a service began") == 2
    assert "a service took points" in said


def test_what_threads_of_a_service_print_is_kept_from_stdout_even_after_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    threads = []

    def late() -> None:
        over.wait(20)
        print("a service, late")

    def nested() -> None:
        print("a thread of a service")
        threads.append(threading.Thread(target=late))
        threads[-1].start()

    class Threads(CsvFile):
        def begin(self, card: Card) -> str:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(print, "a pool of a service").result()
            threads.append(threading.Thread(target=nested))
            threads[-1].start()
            threads[-1].join()
            return "nowhere"

    caplog.set_level("INFO", "memtool.trackers")
    before, start = sys.stdout, threading.Thread.start
    with following(("csv",), card(tmp_path), open_service=lambda _: Threads()):
        print("the program")
    print("data")
    over.set()
    for thread in threads:
        thread.join(20)
    with following(("csv",), card(tmp_path)):
        pass
    assert (sys.stdout, threading.Thread.start) == (before, start)
    assert capsys.readouterr().out.splitlines() == ["the program", "data"]
    said = [record.message for record in caplog.records]
    for text in ("a pool of a service", "a thread of a service", "a service, late"):
        assert said.count(text) == 1
