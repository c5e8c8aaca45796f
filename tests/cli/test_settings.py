"""init, config and completion: what the user sees of the settings."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from memtool.config import presets, resolve
from memtool.settings import Config, keys, sections

NOTE = "note: moram.topk has no effect under method mira: it is of method moram"
TABLE_OF_COMPLETION = {"_MEMTOOL_COMPLETE": "complete_bash"}


def complete(memtool, line: str) -> list[str]:
    """What bash would offer at the end of the line."""
    words = line.split(" ")
    done = memtool(**TABLE_OF_COMPLETION, COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("preset", [preset.name for preset in presets()])
def test_init_writes_the_preset_with_comments(preset, here, memtool):
    done = memtool("init", "--preset", preset)
    assert done.returncode == 0, done.stderr
    assert "next: memtool train-adapter --task 1" in done.stderr
    text = (here / "memtool.yaml").read_text()
    wanted = resolve(preset=preset, environ={}, ambient=False).config
    for key in keys(wanted.method):
        assert f"{key.rpartition('.')[2]}:" in text
    for section in {"memory", "moram", "modulation"} - sections(wanted.method).keys():
        assert f"{section}:" not in text.splitlines()
    assert resolve(file=here / "memtool.yaml", environ={}, ambient=False).config == wanted


def test_every_line_of_an_init_file_can_be_switched_on(here, memtool):
    memtool("init")
    text = (here / "memtool.yaml").read_text()
    settings = text[text.index("# method:") :].replace("# ", "", 1)
    on = "\n".join(re.sub(r"^( *)# ", r"\1", line) for line in settings.splitlines())
    (here / "memtool.yaml").write_text(on)
    resolved = resolve(environ={}, cwd=here)
    assert resolved.config == Config()
    assert all(origin.startswith("memtool.yaml:") for origin in resolved.origin.values())


def test_init_never_overwrites_without_yes(here, memtool):
    (here / "memtool.yaml").write_text("adapter: {rank: 3}\n")
    done = memtool("init")
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert (here / "memtool.yaml").read_text() == "adapter: {rank: 3}\n"
    assert memtool("init", "--yes").returncode == 0
    assert resolve(file=here / "memtool.yaml", environ={}, ambient=False).config == Config()


def test_config_show_tells_where_each_value_is_from(here, memtool):
    (here / "memtool.yaml").write_text("adapter:\n  alpha: 16\n")
    done = memtool(
        "config",
        "show",
        "--origin",
        "--preset",
        "mira-dil",
        "--set",
        "seed=1,2",
        "--device",
        "cpu",
        MEMTOOL_ADAPTER__RANK="6",
    )
    assert done.returncode == 0, done.stderr
    rows = {
        row[0]: tuple(row[1:]) for row in (line.split("\t") for line in done.stdout.splitlines())
    }
    assert rows["setting"] == ("value", "from")
    assert rows["adapter.alpha"] == ("16.0", "memtool.yaml:2")
    assert rows["adapter.rank"] == ("6", "MEMTOOL_ADAPTER__RANK")
    assert rows["seed"] == ("1,2", "command line")
    assert rows["engine.device"] == ("cpu", "command line")
    assert rows["stream.source"] == ("pacs", "preset mira-dil")
    assert rows["memory.mix"] == (Config().memory.mix, "default")
    assert set(rows) == {"setting", *keys("mira")}


def test_config_show_yaml_can_be_given_back(here, memtool):
    text = memtool("config", "show", "--preset", "mira-dil", "--rank", "7", "--yaml")
    assert text.returncode == 2  # --rank belongs to the verbs that train
    text = memtool("config", "show", "--preset", "mira-dil", "--set", "adapter.rank=7", "--yaml")
    (here / "given.yaml").write_text(text.stdout)
    again = memtool("config", "show", "--config", "given.yaml", "--yaml")
    assert again.stdout == text.stdout


def test_a_setting_that_nothing_reads_is_named_once(memtool):
    given = ("run", "--dry-run", "--topk", "8", "--set", "train.iterations=20")
    said = memtool(*given)
    assert said.returncode == 0
    assert said.stderr.splitlines().count(NOTE) == 1
    lines = dict(line.split("\t", 1) for line in said.stdout.splitlines() if line)
    assert lines["setting"] == "dil"
    assert lines["head"] == "lda, one a task"
    assert lines["baselines"].startswith("frozen, sequential, ewc")
    assert lines["runs"] == "runs"
    assert lines["task"] == "name\ttraining\ttest\tepochs\tsteps"
    assert lines["3"] == "rot90\t600\t1197\t2\t24"
    silent = memtool(*given, "--json")
    assert silent.stderr == ""
    facts = json.loads(silent.stdout)["plan"]
    assert facts["steps"] == [24] * 5
    assert facts["baselines"][:3] == ["frozen", "sequential", "ewc"]
    assert "moram" not in memtool("config", "show", MEMTOOL_MORAM__TOPK="8").stderr


def test_presets_are_listed_with_what_they_say_first(memtool):
    rows = [line.split("\t") for line in memtool("config", "presets").stdout.splitlines()][1:]
    assert [row[0] for row in rows] == [preset.path.stem for preset in presets()]
    for (name, what, command), preset in zip(rows, presets(), strict=True):
        first, second, *_ = preset.path.read_text().splitlines()
        assert (f"# {command}", f"# {what}") == (first, second)
        assert f"memtool run --preset {name}" in command


def test_config_as_json(memtool):
    record = json.loads(memtool("config", "show", "--json").stdout)
    assert record["schema"] == "memtool.config"
    assert [setting["key"] for setting in record["settings"]] == list(keys("mira"))
    names = memtool("config", "presets", "-q").stdout.split()
    assert names == [preset.name for preset in presets()]


def test_completion_of_verbs_presets_settings_tasks_and_versions(memory, memtool):
    assert "train-adapter" in complete(memtool, "memtool tr")
    assert complete(memtool, "memtool run --preset mira-di") == ["mira-dil-authors", "mira-dil"]
    assert complete(memtool, "memtool consolidate --sep af") == ["affine"]
    assert "adapter.rank=" in complete(memtool, "memtool run --set adapter.r")
    assert "inverted" in complete(memtool, "memtool train-adapter --task in")
    assert "HEAD" in complete(memtool, "memtool show H")
    assert memory.head() in complete(memtool, f"memtool show {memory.head()[:3]}")
    assert f"memory@{memory.head()}" in complete(
        memtool, f"memtool ls --store memory@{memory.head()[:3]}"
    )


def test_completion_of_folders_with_an_at_sign(here, memtool):
    (here / "a@b" / "memory").mkdir(parents=True)
    assert complete(memtool, "memtool ls --store a@b/me") == ["a@b/memory"]


def test_completion_is_silent_where_it_cannot_know(here, memtool):
    (here / "memtool.yaml").write_text("adapter: [\n")
    assert complete(memtool, "memtool show H") == []
    assert complete(memtool, "memtool train-adapter --task x") == []


def test_what_the_data_are_taken_for_is_said_once_and_on_stderr(here, memtool):
    colours = {"cat": (200, 0, 0), "dog": (0, 0, 200)}
    for part in ("Train", "TEST"):
        for name, colour in colours.items():
            folder = here / "photos" / part / "garden" / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (*colour[:2], number)).save(folder / f"{number}.png")
    (here / "photos" / "TEST" / "list.txt").write_text("")
    asked = ("run", "--dry-run", "--set", "stream.source=photos")
    said = memtool(*asked, MEMTOOL_CACHE=str(here / "cache"))
    notes = [line for line in said.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: photos: 16 images; for training: Train (8); for testing: TEST (8); domains: garden "
        "(16); 2 classes: cat, dog",
        "note: photos: left out: .txt (1)",
        "note: photos: 8 of 8 test images are also among the training images, pixel by pixel",
    ]
    silent = memtool(*asked, "--json", MEMTOOL_CACHE=str(here / "cache"))
    assert silent.stderr == ""
    assert [f"note: {note}" for note in json.loads(silent.stdout)["plan"]["notes"]] == notes
    assert memtool(*asked, "-q", MEMTOOL_CACHE=str(here / "cache")).stderr == ""
