"""A memory in other places: bundles, clones, and every verb on a bucket."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile

import pytest

from memtool_stores import MemoryStore

QUICK = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "60",
    "MEMTOOL_STREAM__TEST_PER_TASK": "40",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def bucket():
    """The variables of an object store on loopback with one bucket."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket="bucket")
    client.close()
    yield {
        **keys,
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    server.stop()


def said(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_adapters_go_in_and_out_without_torch(memtool, here, torchless):
    """Of a memory that is there; the probe fails where torch was loaded."""
    for arguments in (
        ["train-adapter", "--task", "1"],
        ["write"],
        ["train-adapter", "--task", "2"],
    ):
        assert memtool(*arguments, **QUICK).returncode == 0
    trained = here / "runs" / "adapters"
    shutil.copytree(trained / "task-2-seed-0", here / "theirs")
    for own in ("memtool.json", "head.safetensors"):
        (here / "theirs" / own).unlink()
    torchless(
        "write",
        "write",
        "import theirs --task 3",
        "export --out out",
        "export theirs --out one --store memory@HEAD",
        "export --bundle all.bundle",
        "import all.bundle --store copy",
        "import out/task-1-seed-0 one/theirs --store copy",
        **QUICK,
    )
    names = ["task-1-seed-0", "task-2-seed-0", "theirs"]
    for place in ("memory", "copy"):
        store = MemoryStore.open(here / place)
        assert [record.name for record in store.view().live] == names
        assert len(store.log()) == 4, "the empty memory, and one for each time that some were new"
    for name in names:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            source = here / "theirs" if name == "theirs" else trained / name
            assert (here / "out" / name / file).read_bytes() == (source / file).read_bytes()


def test_a_bundle_and_a_clone_in_a_directory(memtool, memory):
    made = said(memtool("export", "--bundle", "memory.bundle", "--json"))
    assert made["schema"] == "memtool.bundle"
    copied = said(memtool("import", "memory.bundle", "--store", "copy", "--json"))
    assert copied["version"] == made["version"]
    assert memtool("log", "-q", "--store", "copy").stdout == memtool("log", "-q").stdout
    assert said(memtool("clone", "twin", "--json"))["adapters"] == made["adapters"]
    assert said(memtool("clone", "twin", "third", "--json"))["version"] == made["version"]
    assert memtool("verify", "--store", "third", "-q").returncode == 0

    assert memtool("clone", "twin").returncode == 4
    assert memtool("clone", "nowhere", "fourth").returncode == 3
    assert memtool("clone", "a", "b", "c").returncode == 2
    assert memtool("export").returncode == 2
    assert memtool("export", "--bundle", "x", "--out", "y").returncode == 2
    assert memtool("export", "--bundle", "memory.bundle").returncode == 4


def test_a_damaged_bundle_is_an_integrity_error(memtool, memory, here):
    memtool("export", "--bundle", "memory.bundle")
    data = bytearray((here / "memory.bundle").read_bytes())
    with zipfile.ZipFile(here / "memory.bundle") as archive:
        entries = [e for e in archive.infolist() if e.filename != "memtool-bundle.json"]
        largest = max(entries, key=lambda entry: entry.file_size)
        content = archive.read(largest)
    data[data.index(content) + len(content) // 2] ^= 1
    (here / "memory.bundle").write_bytes(data)
    done = memtool("import", "memory.bundle", "--store", "copy")
    assert done.returncode == 5
    assert "copy the bundle again" in done.stderr
    assert not (here / "copy").exists()


def test_what_reads_the_store_reads_a_bucket(memtool, memory, bucket):
    url = "s3://bucket/cloned"
    assert said(memtool("clone", url, "--json", **bucket))["target"] == url
    assert said(memtool("clone", "--resume", url, "--json", **bucket))["target"] == url
    for verb in (("ls",), ("log",), ("show",), ("verify",)):
        here_, there = memtool(*verb, "-q"), memtool(*verb, "-q", "--store", url, **bucket)
        assert there.returncode == 0, there.stderr
        assert there.stdout == here_.stdout
    assert memtool("ls", "-q", "--store", f"{url}@HEAD~1", **bucket).returncode == 0
    assert memtool("tag", "v1", "--store", url, **bucket).returncode == 0
    assert memtool("gc", "--keep-last", "1", "--dry-run", "--store", url, **bucket).returncode == 0
    assert memtool("rollback", "HEAD~1", "--yes", "--store", url, **bucket).returncode == 0
    done = memtool("ls", "--store", "s3://nobucket/memory", **bucket)
    assert done.returncode == 3
    assert "no bucket 'nobucket'" in done.stderr
    done = memtool("ls", "--store", url, **bucket | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:9" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_on_a_bucket(memtool, here, bucket):
    more = ("--store", "s3://bucket/flow")
    with_settings = {**QUICK, **bucket}
    for task in ("1", "2"):
        assert memtool("train-adapter", "--task", task, *more, **with_settings).returncode == 0
        done = memtool("write", *more, **with_settings)
        assert done.returncode == 0, done.stderr
        assert memtool("consolidate", *more, **with_settings).returncode == 0
    assert said(memtool("eval", "--json", *more, **with_settings))["run"]["store"] == more[1]
    retrieved = said(memtool("retrieve", "--task", "2", "--json", *more, **with_settings))
    assert len(retrieved["adapters"]) == 2
    old = ("--store", "s3://bucket/flow@HEAD~2")
    assert len(said(memtool("eval", "--json", *old, **with_settings))["run"]["tasks"]) == 1
    assert said(memtool("diff", "HEAD~2", "--json", *more, **bucket))["added"]
    assert memtool("export", "--out", "out", *more, **with_settings).returncode == 0
    done = memtool("forget", "1", *more, **with_settings)
    assert done.returncode == 0, done.stderr
    assert memtool("import", "out/task-1-seed-0", *more, **with_settings).returncode == 0
    assert memtool("verify", *more, **bucket).returncode == 0
