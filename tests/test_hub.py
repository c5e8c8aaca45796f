"""Memories for others: on the hub, against a server that speaks as it, and as programs of torch."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from safetensors.torch import load_file

import memtool
import memtool_stores.store
from memtool import hub
from memtool.backbones.nano import build_nano
from memtool.config import resolve
from memtool.errors import ChangedMeanwhileError, ConfigError, MismatchError, NotFoundError
from memtool.evaluation.record import Record, read_record, write_record
from memtool.methods import open_method
from memtool.methods.export import export_peft
from memtool.methods.home import Home, stored_home
from memtool.program import export_model
from memtool_stores import (
    AlreadyExistsError,
    IntegrityError,
    MemoryStore,
    SchemaError,
    StorageError,
)
from memtool_stores import hub as store_hub
from memtool_stores.files import part_folder
from memtool_stores.ice import sync_to_disk
from memtool_stores.move import Forwarded
from memtool_stores.references import MARKS
from memtool_stores.testing import fill, small_space
from tests.cli.conftest import inside
from tests.hub_server import Hub, serving

# Of the client's own way to upload a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_" + "w" * 34
SMALL = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 20,
    "train.epochs": 1,
    "adapter.rank": 4,
    "adapter.alpha": 4,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `memory`, of two tasks and tagged `good`, and its `record.json`."""
    folder = tmp_path_factory.mktemp("learned")
    where = {"store": str(folder / "memory"), "runs": str(folder / "runs")}
    config = resolve(
        preset="digits-dil", overrides={**SMALL, **where}, environ={}, cwd=folder
    ).config
    method = open_method(config, seed=0)
    for task in "12":
        method.adapt(task)
        method.write()
    method.consolidate()
    MemoryStore.open(folder / "memory").tag("good")
    write_record(method.evaluate(), folder / "record.json")
    return folder


def _home(learned: Path) -> Home:
    config = memtool.load(learned / "memory").config
    found = stored_home(config.model_copy(update={"store": str(learned / "memory")}), seed=0)
    assert found is not None
    return found


@pytest.fixture
def record(learned: Path) -> Record:
    return read_record(learned / "record.json")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of whom the token at hand is that of the user `ann`."""
    with serving() as made:
        made.tokens = {SECRET: "ann", "hf_read" + "r" * 30: "ann", "hf_" + "b" * 34: "bob"}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(hf_api.api, "endpoint", made.url)  # of huggingface_hub.file_exists
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(store_hub, "KNOWN_SECONDS", 0.0)
        yield made


@pytest.fixture
def small(tmp_path: Path) -> MemoryStore:
    """A store of three versions that does not say what it was made with."""
    store = MemoryStore.create(tmp_path / "small", small_space())
    for task in range(2):
        with store.transaction(f"write task {task}") as txn:
            fill(txn, small_space(), f"t{task}", task)
    return store


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a store consists of, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in ("ice", "sums")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def test_what_is_pushed_is_pulled_byte_for_byte_with_its_history(server, small, tmp_path):
    small.tag("v1", "HEAD~1")
    pushed = hub.push(small.url, "ann/small")
    assert pushed.version == small.head()
    assert pushed.commit == server.repositories["ann/small"].commits[-1][0]
    pulled = hub.pull("ann/small", tmp_path / "copy").store
    assert files_of(Path(pulled.url)) == files_of(Path(small.url))
    assert [one.id for one in pulled.log()] == [one.id for one in small.log()]
    assert pulled.tags() == small.tags()
    assert pulled.verify("full").ok
    with pulled.transaction("goes on") as txn:
        fill(txn, small_space(), "more", 9)
    assert len(pulled.view()) == 3


def test_an_older_copy_is_brought_up_to_date_and_one_that_went_its_own_way_is_not(
    server, small, tmp_path, monkeypatch
):
    hub.push(small.url, "ann/small")
    copy, apart, tagged = (
        hub.pull("ann/small", tmp_path / name).store for name in ("copy", "apart", "tagged")
    )
    before = copy.head()
    head = tmp_path / "copy" / "ice" / "refs" / "branch.main" / "ref.json"
    old, at_sync = head.read_bytes(), []

    def sync(place):
        at_sync.append(head.read_bytes() == old)
        sync_to_disk(place)

    with small.transaction("more") as txn:
        fill(txn, small_space(), "t2", 2)
    small.tag("good")
    small.branch("aside", "HEAD~1")
    hub.push(small.url, "ann/small")
    reader = MemoryStore.open(tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(memtool_stores.store, "sync_to_disk", sync)
        pulled = hub.pull("ann/small", tmp_path / "copy")
    assert pulled.came == Forwarded(branches=("aside", "main"), tags=("good",))
    new = pulled.store
    assert at_sync == [True, False]  # what references lead to is on the disk before them
    marked = (sorted(p.name for p in (Path(one.url) / MARKS).iterdir()) for one in (new, small))
    assert next(marked) == next(marked)
    assert new.head() == small.head() != before
    assert (new.tags(), new.branches()) == (small.tags(), small.branches())
    assert files_of(tmp_path / "copy") == files_of(Path(small.url))
    assert new.verify("full").ok
    assert len(reader.view(before).adapters) == 2  # who has it open goes on
    again = hub.pull("ann/small", tmp_path / "copy")
    assert (again.store.head(), again.came) == (small.head(), Forwarded())

    with apart.transaction("its own") as txn:
        fill(txn, small_space(), "own", 7)
    own = files_of(tmp_path / "apart")
    with pytest.raises(AlreadyExistsError, match="its HEAD"):
        hub.pull("ann/small", tmp_path / "apart")
    assert files_of(tmp_path / "apart") == own
    other = MemoryStore.create(tmp_path / "other", small_space())
    with pytest.raises(AlreadyExistsError, match="another memory"):
        hub.pull("ann/small", other.url)
    with new.transaction("ahead") as txn:
        fill(txn, small_space(), "t3", 3)
    with pytest.raises(AlreadyExistsError, match="its HEAD"):
        hub.pull("ann/small", new.url)
    tagged.tag("good", "HEAD~1")
    with pytest.raises(AlreadyExistsError, match="its tag good"):
        hub.pull("ann/small", tagged.url)
    small.branch("gone", "HEAD~1")
    small.tag("old")
    hub.push(small.url, "ann/small")
    known = hub.pull("ann/small", tmp_path / "known").store
    small.delete_branch("gone")
    hub.push(small.url, "ann/small")
    with pytest.raises(AlreadyExistsError, match="its branch gone is not in"):
        hub.pull("ann/small", known.url)
    known.delete_branch("gone")
    small.delete_tag("old")
    hub.push(small.url, "ann/small")
    with pytest.raises(AlreadyExistsError, match=r"its tag old is not in .*, or was taken"):
        hub.pull("ann/small", known.url)
    assert known.tags()["old"] == known.head()


def test_a_tag_that_was_deleted_in_the_copy_stays_so_and_is_said_once_a_pull(
    server, small, tmp_path
):
    small.tag("good")
    hub.push(small.url, "ann/small")
    made = hub.pull("ann/small", tmp_path / "copy")
    assert made.came is None
    made.store.delete_tag("good")
    before = files_of(tmp_path / "copy")
    again = hub.pull("ann/small", tmp_path / "copy")
    assert (again.came, again.store.tags()) == (Forwarded(deleted=("good",)), {})
    assert files_of(tmp_path / "copy") == before
    with small.transaction("more") as txn:
        fill(txn, small_space(), "t2", 2)
    small.tag("better")
    hub.push(small.url, "ann/small")

    def pulled():
        done = inside(tmp_path, dict(os.environ), "pull", "ann/small", "--store", "copy", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert done.stderr.count("tag good was deleted in") == 1
        return told["branches"], told["tags"], told["deleted"], "nothing new" in done.stderr

    assert pulled() == (["main"], ["better"], ["good"], False)
    assert pulled() == ([], [], ["good"], True)
    copy = MemoryStore.open(tmp_path / "copy")
    assert (copy.tags(), copy.verify("full").ok) == ({"better": small.head()}, True)


def test_part_folders_of_copies_that_died_are_taken_away(server, small, tmp_path):
    hub.push(small.url, "ann/small")
    folder = Path(store_hub.copy_of("hf://ann/small"))
    old, new = part_folder(folder), part_folder(folder)
    (old / "ice").mkdir()
    os.utime(old, (0, 0))
    with small.transaction("more") as txn:
        fill(txn, small_space(), "t2", 2)
    hub.push(small.url, "ann/small")
    assert Path(store_hub.copy_of("hf://ann/small")) != folder
    assert not old.exists()
    assert new.exists()


def test_a_repository_is_read_as_a_store_and_never_written_to(server, small, tmp_path):
    hub.push(small.url, "ann/small")
    store = MemoryStore.open("hf://ann/small")
    assert repr(store) == "MemoryStore.open('hf://ann/small')"
    assert store.view("HEAD~1").version == small.view("HEAD~1").version
    np.testing.assert_array_equal(store.view().value("t0"), small.view().value("t0"))
    before = files_of(Path(store.url))
    for change in (
        lambda: store.run(lambda txn: fill(txn, small_space(), "x", 1), "no"),
        lambda: store.tag("no"),
        lambda: store.rollback("HEAD~1"),
        store.gc,
        lambda: MemoryStore.create("hf://ann/other", small_space()),
        lambda: small.clone("hf://ann/other"),
    ):
        with pytest.raises(StorageError, match="can be read, not written to"):
            change()
    assert files_of(Path(store.url)) == before
    store.bundle(tmp_path / "bundle")
    assert MemoryStore.from_bundle(tmp_path / "bundle", tmp_path / "of-bundle").verify().ok


def test_a_push_is_one_commit_and_sends_only_what_is_new(server, small):
    first = hub.push(small.url, "ann/small")
    again = hub.push(small.url, "ann/small")
    assert again.unchanged
    assert (again.commit, first.unchanged) == (first.commit, False)
    with small.transaction("write task 2") as txn:
        fill(txn, small_space(), "t2", 2)
    known = len(server.objects)
    server.asked.clear()
    second = hub.push(small.url, "ann/small", message="a third adapter")
    assert [message for _, message, _ in server.repositories["ann/small"].commits] == [
        "initial commit",
        f"memtool push: version {first.version}",
        "a third adapter",
    ]
    assert second.version == MemoryStore.open("hf://ann/small").head() == small.head()
    assert len(server.objects) - known == sum(method == "PUT" for method, _ in server.asked) > 0
    small.gc(keep_last=1)
    hub.push(small.url, "ann/small")
    stored = {f"memory/{path}": data for path, data in files_of(Path(small.url)).items()}
    published = server.files("ann/small")
    assert {p: d for p, d in published.items() if p.startswith("memory/")} == stored


def test_an_upload_that_breaks_publishes_nothing_and_is_done_again(server, small, monkeypatch):
    hub.push(small.url, "ann/small")
    before = server.files("ann/small")
    with small.transaction("large") as txn:
        for number in range(3):
            txn.put_blob(f"blob{number}", bytes([number]) * 9000)
    server.fail_uploads_after = 1
    with pytest.raises(StorageError, match="does not permit"):
        hub.push(small.url, "ann/small")
    assert server.files("ann/small") == before
    assert MemoryStore.open("hf://ann/small").head() == small.view("HEAD~1").version
    server.fail_uploads_after = None
    hub.push(small.url, "ann/small")
    assert MemoryStore.open("hf://ann/small").view().blob("blob2") == bytes([2]) * 9000


def test_nobody_is_overwritten(server, small, tmp_path):
    hub.push(small.url, "ann/small")
    theirs = small.clone(tmp_path / "theirs")
    with theirs.transaction("theirs") as txn:
        fill(txn, small_space(), "theirs", 5)
    hub.push(theirs.url, "ann/small")
    with pytest.raises(ChangedMeanwhileError, match="which this memory has not"):
        hub.push(small.url, "ann/small")
    other = MemoryStore.create(tmp_path / "other", small_space())
    with pytest.raises(MismatchError, match="holds another memory"):
        hub.push(other.url, "ann/small")
    files = server.repositories["ann/small"].commits[-1][2]
    server.repositories["ann/model"] = type(server.repositories["ann/small"])(False)
    server.repositories["ann/model"].add("m", {"model.bin": files["memtool.json"]})
    with pytest.raises(MismatchError, match=r"holds something else \(model.bin\)"):
        hub.push(small.url, "ann/model")

    def meanwhile() -> None:
        server.before_commit = None
        server.repositories["ann/small"].add("between", files)

    with theirs.transaction("again") as txn:
        fill(txn, small_space(), "again", 6)
    server.before_commit = meanwhile
    with pytest.raises(ChangedMeanwhileError, match="meanwhile; nothing was published"):
        hub.push(theirs.url, "ann/small")
    assert server.repositories["ann/small"].commits[-1][1] == "between"


def test_what_is_to_be_private_never_goes_to_a_public_repository(server, small):
    hub.push(small.url, "ann/small")
    with small.transaction("a secret") as txn:
        fill(txn, small_space(), "secret", 5)
    commits = list(server.repositories["ann/small"].commits)
    with pytest.raises(MismatchError, match="is public; nothing was published"):
        hub.push(small.url, "ann/small", private=True)
    assert server.repositories["ann/small"].commits == commits


def test_what_is_wrong_is_said_with_what_helps_and_without_secrets(
    server, small, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG, "memtool")
    said: list[str] = []

    def refused(kind: type[Exception], does: Callable[[], object], match: str) -> None:
        with pytest.raises(kind, match=match) as caught:
            does()
        said.append(str(caught.value))

    hub.push(small.url, "ann/secret", private=True)
    assert server.repositories["ann/secret"].private
    refused(NotFoundError, lambda: MemoryStore.open("hf://ann/none"), "no repository ann/none")
    refused(StorageError, lambda: hub.push(small.url, "bob/mine"), "does not permit it")
    refused(SchemaError, lambda: hub.push(small.url, "nobody"), "names no repository")
    refused(SchemaError, lambda: MemoryStore.open("hf://a/b/c"), "names no repository")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    refused(StorageError, lambda: hub.push(small.url, "ann/small"), "token at hand")
    monkeypatch.setenv("HF_TOKEN", "hf_read" + "r" * 30)
    assert len(MemoryStore.open("hf://ann/secret").view()) == 2
    refused(StorageError, lambda: hub.push(small.url, "ann/small"), "does not permit it")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "bob"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    refused(NotFoundError, lambda: MemoryStore.open("hf://ann/secret"), "may not see it")
    monkeypatch.delenv("HF_TOKEN")
    refused(ConfigError, lambda: hub.push(small.url, "ann/small"), "no token")
    assert "hf auth login" in said[-1]
    refused(NotFoundError, lambda: MemoryStore.open("hf://ann/secret"), "hf auth login|private")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(StorageError, lambda: hub.pull("ann/small", tmp_path / "no"), "no answer from")
    assert not (tmp_path / "no").exists()
    for token in server.tokens:
        assert token not in "\n".join((*said, caplog.text))


def test_without_a_network_the_last_copy_is_read(server, small, monkeypatch):
    hub.push(small.url, "ann/small")
    MemoryStore.open("hf://ann/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert MemoryStore.open("hf://ann/small").head() == small.head()
    assert server.asked == []


def test_damage_is_never_pulled(server, small, tmp_path):
    hub.push(small.url, "ann/small")
    _, _, files = server.repositories["ann/small"].commits[-1]
    path = next(path for path in sorted(files) if path.startswith("memory/ice/chunks/"))
    broken = bytearray(files[path].data)
    broken[len(broken) // 2] ^= 1
    damaged = type(files[path])(bytes(broken), files[path].lfs)
    server.repositories["ann/small"].add("rot", {**files, path: damaged})
    with pytest.raises(IntegrityError, match="of which nothing was kept"):
        hub.pull("ann/small", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    server.repositories["ann/small"].add("mended", files)
    with pytest.raises(AlreadyExistsError):
        hub.pull("ann/small", tmp_path / "taken")


def test_a_memory_is_loaded_from_the_hub_and_peft_loads_its_adapters(
    server, learned, record, tmp_path
):
    from peft import PeftModel

    pushed = hub.push(learned / "memory", "ann/digits", records=[record])
    assert len(pushed.adapters) == 2
    here, there = memtool.load(learned / "memory"), memtool.load("hf://ann/digits@good")
    assert there.classes == here.classes
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(there.attach()(pixels).logits, here.attach()(pixels).logits)
    for name in pushed.adapters:
        exported = export_peft(_home(learned), [name], out=tmp_path)[0]
        weights = load_file(exported / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(
            build_nano(), "ann/digits", subfolder=f"adapters/{name}"
        ).state_dict()
        for key, value in weights.items():
            loaded = key.removesuffix(".weight") + ".default.weight"
            torch.testing.assert_close(model[loaded], value, rtol=0, atol=0)


def test_the_card_says_what_was_measured_and_keeps_what_others_wrote(server, learned, record):
    pushed = hub.push(learned / "memory", "ann/digits", records=[record], dataset="ann/digits-data")
    files = server.files("ann/digits")
    card = ModelCard(files["README.md"].decode())
    assert {"peft", "lora"} <= set(card.data.tags)
    row = next(row for row in record.metrics.rows if row.kind == "method")
    average = 100 * row.metrics["faa"]
    assert f"{average:.1f}" in card.text
    for name in pushed.adapters:
        assert f"`adapters/{name}`" in card.text
    for version in MemoryStore.open(learned / "memory").log():
        assert f"`{version.id}`" in card.text
    assert files["figures/accuracy.png"].startswith(b"\x89PNG")
    (entry,) = yaml.safe_load(files[".eval_results/memtool.yaml"])
    assert entry["dataset"] == {"id": "ann/digits-data", "task_id": "dil"}
    assert entry["value"] == pytest.approx(average, abs=1e-3)
    assert str(Path.home()) not in files["README.md"].decode()

    repository = server.repositories["ann/digits"]
    text = files["README.md"].decode().replace("---\n\n", "---\n\nMine, before.\n\n", 1)
    text = text.replace("library_name: memtool", "library_name: memtool\nlicense: mit")
    _, _, there = repository.commits[-1]
    edited = type(there["README.md"])(text.encode(), False)
    repository.add("edit the card", {**there, "README.md": edited})
    assert not hub.push(learned / "memory", "ann/digits").unchanged
    files = server.files("ann/digits")
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.text.strip().startswith("Mine, before.")
    assert card.text.count("## Adapters") == 1
    assert "## Measured" not in card.text
    assert not {".eval_results/memtool.yaml", "figures/accuracy.png"} & files.keys()


def test_a_record_of_another_memory_is_refused(server, small, record):
    with pytest.raises(MismatchError, match="a record of the model"):
        hub.push(small.url, "ann/small", records=[record])
    assert server.repositories == {}


def test_the_command_line(server, learned, tmp_path, monkeypatch):
    def run(*arguments: str, **variables: str):
        return inside(tmp_path, {**os.environ, **variables}, *arguments)

    memory = str(learned / "memory")
    done = run("push", "ann/digits", "--store", memory, "--record", str(learned), "--json")
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)
    assert pushed["schema"] == "memtool.push"
    assert pushed["commit"] == server.repositories["ann/digits"].commits[-1][0]
    assert (
        run("ls", "-q", "--store", "hf://ann/digits").stdout
        == run("ls", "-q", "--store", memory).stdout
    )
    log = run("log", "-q", "--store", "hf://ann/digits@good")
    assert log.stdout.split()[0] == pushed["version"]
    retrieved = run("retrieve", "--task", "1", "--store", "hf://ann/digits@good", "-q")
    assert retrieved.returncode == 0, retrieved.stderr
    assert (
        run("eval", "-q", "--store", "hf://ann/digits").stdout
        == run("eval", "-q", "--store", memory).stdout
    )
    assert run("tag", "no", "--store", "hf://ann/digits").returncode == 1
    done = run("pull", "ann/digits", "--store", "copy", "-q")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "copy") == files_of(learned / "memory")
    monkeypatch.delenv("HF_TOKEN")
    done = run("push", "ann/digits", "--store", memory)
    assert (done.returncode, "hf auth login" in done.stderr) == (2, True)
    assert run("pull", "ann/none", "--store", "other").returncode == 3
    assert SECRET not in done.stderr + log.stderr


def test_a_program_answers_any_batch_as_the_memory_and_needs_no_memtool(learned, tmp_path):
    done = inside(
        tmp_path,
        dict(os.environ),
        *("export", "--store", f"{learned / 'memory'}@good", "--model", "memory.pt2", "--json"),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    memory = memtool.load(learned / "memory@good")
    assert said["version"] == memory.version
    assert said["input"] == ["n", 3, 32, 32]
    assert said["outputs"]["logits"] == ["n", len(memory.classes)]
    note = {"memtool.json": ""}
    program = torch.export.load(tmp_path / "memory.pt2", extra_files=note).module()
    about = json.loads(note["memtool.json"])
    assert tuple(about["classes"]) == memory.classes
    assert about["adapters"] == [record.name for record in memory.adapters]
    model = memory.attach()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    shifted = images.permute(0, 3, 1, 2) / 255 - torch.tensor(about["mean"]).view(3, 1, 1)
    pixels = shifted / torch.tensor(about["std"]).view(3, 1, 1)
    for count in (1, 5):
        found, expected = program(pixels[:count]), model(images[:count])
        assert list(found) == ["logits", "probabilities", "weights", "novelty"]
        for name, value in found.items():
            torch.testing.assert_close(value, getattr(expected, name), equal_nan=True)
    with zipfile.ZipFile(tmp_path / "memory.pt2") as archive:
        (graph,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
        assert b"memtool.Output" not in archive.read(graph)
        assert str(Path(memtool.__file__).parent).encode() not in archive.read(graph)


def test_a_program_that_torch_cannot_write_is_refused_and_leaves_no_file(
    learned, tmp_path, monkeypatch
):
    def cannot(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(torch.export, "export", cannot)
    with pytest.raises(MismatchError, match=r"RuntimeError: no such operator\nexpected"):
        export_model(learned / "memory", tmp_path / "memory.pt2")
    assert list(tmp_path.iterdir()) == []
    done = inside(
        tmp_path, dict(os.environ), "export", "--store", str(learned / "memory"), "--model", "."
    )
    assert (done.returncode, "is a folder" in done.stderr) == (2, True)
