"""Settings: their precedence, where each is from, and what a wrong one is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from memtool.config import parse_assignment, presets, resolve, to_yaml, user_file
from memtool.errors import ConfigError, NotFoundError
from memtool.paths import expand, split_store, store_beside
from memtool.sections import SECTIONS
from memtool.settings import READ_UNDER, Config, choices, get, keys


@pytest.fixture(autouse=True)
def no_settings_around(tmp_path, monkeypatch):
    """A user folder and a working folder of the test's own, and no variables."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "user" / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_the_defaults_hold():
    resolved = resolve(environ={})
    assert resolved.config == Config()
    assert resolved.preset == "digits-dil"
    assert set(resolved.origin) == set(keys("mira"))
    assert set(resolved.origin.values()) == {"default"}


def test_every_level_wins_over_those_below():
    levels = [
        ("preset mira-dil", lambda given: given.update(preset="mira-dil"), 6),
        ("user", lambda given: write(user_file(), "train: {epochs: 11}"), 11),
        ("memtool.yaml:2", lambda given: write(Path("memtool.yaml"), "train:\n  epochs: 12"), 12),
        (
            "c.yaml:1",
            lambda given: given.update(file=write(Path("c.yaml"), "train.epochs: 13")),
            13,
        ),
        ("MEMTOOL_TRAIN__EPOCHS", lambda g: g.update(environ={"MEMTOOL_TRAIN__EPOCHS": "14"}), 14),
        ("command line", lambda given: given.update(overrides={"train.epochs": "15"}), 15),
    ]
    given = {"environ": {}}
    for origin, add, epochs in levels:
        add(given)
        resolved = resolve(**given)
        assert resolved.config.train.epochs == epochs
        if origin != "user":
            assert resolved.origin["train.epochs"] == origin
        else:
            assert resolved.origin["train.epochs"] == f"{user_file()}:1"
    assert resolved.origin["backbone.name"] == "preset mira-dil"
    assert resolved.origin["memory.mix"] == "default"


def test_not_ambient_means_only_what_is_named():
    write(Path("memtool.yaml"), "adapter: {rank: 3}")
    write(user_file(), "adapter: {alpha: 3}")
    environ = {"MEMTOOL_STORE": "elsewhere"}
    assert resolve(environ=environ, ambient=False).config == Config()
    assert resolve(environ=environ).config.adapter.rank == 3


def test_text_is_read_by_the_type_of_the_setting():
    config = resolve(
        environ={"MEMTOOL_SEED": "0, 1,2", "MEMTOOL_ENGINE__COMPILE": "true"},
        overrides={
            "stream.order": "[photo, sketch]",
            "stream.train_per_task": "none",
            "train.lr": "1e-3",
            "backbone.weights": "",
            "adapter.warm_start": "none",
            "store": "2024",
        },
    ).config
    assert config.seed == (0, 1, 2)
    assert config.engine.compile is True
    assert config.stream.order == ("photo", "sketch")
    assert config.stream.train_per_task is None
    assert config.train.lr == 1e-3
    assert config.backbone.weights is None
    assert config.adapter.warm_start == "none"
    assert config.store == "2024"


def test_one_value_stands_for_several_with_one():
    assert resolve(file=write(Path("c.yaml"), "seed: 3"), environ={}).config.seed == (3,)


@pytest.mark.parametrize("preset", [preset.name for preset in presets()])
def test_dump_and_load_gives_an_equal_configuration(preset):
    config = resolve(preset=preset, environ={}, overrides={"seed": (1, 2)}).config
    file = write(Path("dumped.yaml"), to_yaml(config))
    assert resolve(file=file, environ={}).config == config


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_a_preset_begins_with_the_command_that_runs_it(preset):
    assert preset.launch.endswith(f"memtool run --preset {preset.name}")
    assert preset.summary


def test_the_default_preset_is_the_defaults():
    assert resolve(preset="digits-dil", environ={}).config == Config()


def test_every_setting_has_a_description():
    assert [key for key, field in keys().items() if not field.description] == []


def test_get_reads_a_dotted_key():
    assert get(Config(), "memory.separation") == "softmax"
    assert "affine" in choices("memory.separation")
    assert choices("adapter.rank") == ()


@pytest.mark.parametrize(
    ("text", "line", "said", "expected"),
    [
        ("adapter:\n  rank: 4\n  rnk: 3", 3, "adapter.rnk", "'adapter.rank'"),
        ("rank: 3", 1, "no setting 'rank'", "'adapter.rank'"),
        ("epochs: 3", 1, "no setting 'epochs'", "'text.epochs' or 'consolidate.epochs'"),
        (
            "zzz: 3",
            1,
            "no setting 'zzz'",
            "one of method, store, lock_timeout, runs",
        ),
        ("adapter:\n  rank: 0", 2, "adapter.rank cannot be '0'", "greater than or equal to 1"),
        ("memory:\n  separation: afine", 2, "'afine'", "did you mean 'affine'?"),
        ("adapter: 4", 1, "'adapter' is a section", "adapter.rank"),
        ("adapter: [4]", 1, "'adapter' is a section", "adapter.rank"),
        ("- 4", 1, "no settings here", "key: value"),
        ("adapter.rank: 3\nadapter:\n  rank: 3", 3, "set twice", None),
        ("seed: []", 1, "seed cannot be", "at least 1 item"),
        ("seed: -1", 1, "seed cannot be", "greater than or equal to 0"),
        ("a: [1", 1, "not YAML", None),
    ],
)
def test_a_wrong_file_is_told_with_its_line(text, line, said, expected):
    with pytest.raises(ConfigError) as caught:
        resolve(file=write(Path("bad.yaml"), text), environ={})
    assert f"bad.yaml:{line}: " in caught.value.message
    assert said in caught.value.message
    assert expected is None or expected in (caught.value.expected or "")


@pytest.mark.parametrize("text", ["", "# nothing\n", "adapter:\n  # rank: 8\ntrain:\n"])
def test_nothing_set_is_nothing_wrong(text):
    assert resolve(file=write(Path("c.yaml"), text), environ={}).config == Config()


def test_a_wrong_variable_is_named():
    with pytest.raises(ConfigError, match="MEMTOOL_ADAPTER__RNK") as caught:
        resolve(environ={"MEMTOOL_ADAPTER__RNK": "3"})
    assert caught.value.expected == "did you mean MEMTOOL_ADAPTER__RANK?"
    with pytest.raises(ConfigError, match=r"MEMTOOL_ADAPTER__RANK: adapter\.rank cannot be 'x'"):
        resolve(environ={"MEMTOOL_ADAPTER__RANK": "x"})


def test_data_and_cache_are_not_settings():
    environ = {"MEMTOOL_DATA": "data", "MEMTOOL_CACHE": "cache"}
    assert resolve(environ=environ).config == Config()


def test_what_is_not_there_is_not_found():
    with pytest.raises(NotFoundError, match=r"nowhere\.yaml"):
        resolve(file=Path("nowhere.yaml"), environ={})
    with pytest.raises(NotFoundError) as caught:
        resolve(preset="mira-dul", environ={})
    assert "'mira-dil'" in (caught.value.expected or "")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(file=tmp_path / "binary.yaml", environ={})


def test_a_yaml_file_cannot_run_code():
    with pytest.raises(ConfigError, match=r"c\.yaml:1: the tag .*os\.system"):
        resolve(file=write(Path("c.yaml"), "store: !!python/name:os.system"), environ={})
    assert yaml.safe_load(to_yaml(Config()))["adapter"]["rank"] == Config().adapter.rank


def test_assignments():
    assert parse_assignment("adapter.rank = 8") == ("adapter.rank", "8")
    assert parse_assignment("store=a=b") == ("store", "a=b")
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        parse_assignment("adapter.rank")


@pytest.mark.parametrize(
    ("store", "parts"),
    [
        ("memory", ("memory", "HEAD")),
        ("memory@HEAD~2", ("memory", "HEAD~2")),
        ("a@b/memory@v1", ("a@b/memory", "v1")),
        ("s3://bucket/m@abc", ("s3://bucket/m", "abc")),
        ("s3://bucket/a@b@v1", ("s3://bucket/a@b", "v1")),
        ("a@b@v1", ("a@b", "v1")),
        ("a@b/", ("a@b/", "HEAD")),
        ("~nouser@v1", ("~nouser", "v1")),
        ("nul\0@v1", ("nul\0", "v1")),
        ("memory@", ("memory", "HEAD")),
    ],
)
def test_a_store_and_its_version(store, parts):
    assert split_store(store) == parts


def test_what_is_there_as_written_is_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a@b").mkdir()
    assert split_store("a@b") == ("a@b", "HEAD")
    assert split_store("a@b@v1") == ("a@b", "v1")
    assert split_store(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", "HEAD")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_store("~/a@b") == ("~/a@b", "HEAD")


@pytest.mark.parametrize("store", ["memory", "a@b/", "a@b/c", "s3://bucket/m", "memory@v1"])
def test_a_store_beside_another_reads_back_as_its_address(store):
    address = split_store(store)[0].rstrip("/")
    beside = split_store(store_beside(store, "-seed-1"))
    assert beside[0].rstrip("/") == f"{address}-seed-1"
    assert beside[1] == "HEAD"


def test_a_record_of_the_configuration_does_not_name_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"store": f"{tmp_path}/m", "runs": "~/r", "stream.source": f"{tmp_path}x/d"}
    config = resolve(overrides=given, environ={}).config
    assert config.runs == tmp_path / "r"
    recorded = config.recorded()
    assert (recorded["store"], recorded["runs"]) == ("~/m", "~/r")
    assert recorded["stream"]["source"] == f"{tmp_path}x/d"


def test_variables_in_paths_are_expanded_at_use():
    assert expand("${A}/b", {"A": "/x"}) == Path("/x/b")
    assert expand("plain/b", {}) == Path("plain/b")
    with pytest.raises(ConfigError, match="variable A is not set") as caught:
        expand("${A}/b", {})
    assert caught.value.remedy == "export A=FOLDER"


def test_importing_the_settings_loads_no_torch():
    code = "import sys, memtool.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# Sections of methods


@pytest.mark.parametrize("method", SECTIONS)
def test_a_configuration_has_the_sections_of_its_method_alone(method):
    config = Config(method=method)
    assert set(config.model_dump()) - Config.model_fields.keys() == set(SECTIONS[method])
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")
    assert Config.model_validate(config.recorded()) == config
    for other in {name for parts in SECTIONS.values() for name in parts} - set(SECTIONS[method]):
        assert not hasattr(config, other)
        with pytest.raises(ValidationError, match=other):
            Config.model_validate({"method": method, other: {}})


def test_a_file_for_another_method_is_told_who_reads_it():
    file = write(Path("c.yaml"), "train: {epochs: 3}\nmodulation:\n  hidden: 3\n")
    with pytest.raises(ConfigError) as caught:
        resolve(file=file, environ={})
    assert caught.value.message == (
        "c.yaml:3: 'modulation' is a section of method modulation, and the method is mira"
    )
    assert caught.value.remedy == "`method: modulation` in c.yaml, or --method modulation"
    write(Path("memtool.yaml"), "memory.beta: 0.5")
    with pytest.raises(ConfigError, match=r"memtool.yaml:1: .* method mira, and the method is"):
        resolve(preset="modulation-til", environ={})


def test_a_file_may_hold_what_its_own_method_reads():
    file = write(Path("c.yaml"), "method: modulation\nmodulation: {hidden: 3}\nseed: 4\n")
    assert resolve(file=file, environ={}).config.modulation.hidden == 3
    assert resolve(file=file, environ={}, overrides={"method": "moram"}).config.seed == (4,)
    with pytest.raises(ConfigError, match="'moram' is a section of method moram"):
        resolve(file=write(file, "method: mira\nmoram: {topk: 3}"), environ={})


def test_a_file_with_the_sections_of_all_methods_is_for_all():
    whole: dict[str, object] = {}
    for method in ("moram", "modulation", "mira"):
        whole |= yaml.safe_load(to_yaml(Config(method=method)))
    file = write(Path("c.yaml"), yaml.safe_dump(whole))
    assert resolve(file=file, environ={}).config == Config()
    other = resolve(file=file, environ={}, overrides={"method": "moram"})
    assert other.config == Config(method="moram")


def test_presets_the_user_and_what_reads_a_memory_pass_others_over():
    write(user_file(), "memory: {beta: 3}\nmodulation: {hidden: 3}")
    assert resolve(environ={}).config.memory.beta == 3
    assert resolve(preset="mira-dil", environ={}, overrides={"method": "moram"}).config.train.lr
    write(Path("memtool.yaml"), "memory: {beta: 4}")
    found = resolve(environ={}, remembered={"method": "moram", "moram.topk": 3})
    assert (found.config.method, found.config.moram.topk) == ("moram", 3)
    with pytest.raises(ConfigError, match=r"c.yaml:1: 'memory'"):
        resolve(
            file=write(Path("c.yaml"), "memory: {beta: 4}"),
            environ={},
            remembered={"method": "moram"},
        )


@pytest.mark.parametrize("name", ["mora", "", "a b"])
def test_a_method_that_nobody_has(name):
    with pytest.raises(ConfigError, match="MEMTOOL_METHOD: method cannot be") as caught:
        resolve(environ={"MEMTOOL_METHOD": name})
    assert "moram" in (caught.value.expected or "")
    with pytest.raises(ConfigError, match=r"c.yaml:2: method cannot be"):
        resolve(file=write(Path("c.yaml"), f"seed: 1\nmethod: {name!r}"), environ={})


# Settings without effect


@pytest.mark.parametrize(
    ("preset", "overrides", "sentences"),
    [
        ("digits-dil", {"moram.topk": "8"}, ["moram.topk has no effect under method mira"]),
        ("moram-digits", {"moram.topk": "8", "memory.mix": "delta"}, ["memory.mix has no effect"]),
        ("moram-digits", {"stream.classes_per_task": "2"}, ["under stream.splits 5"]),
        ("digits-dil", {"stream.splits": "5"}, ["has no effect under stream.setting dil"]),
        ("digits-dil", {"text.shots": "5"}, ["has no effect under stream.setting dil"]),
        ("digits-dil", {"text.epochs": "1", "train.epochs": "1"}, ["text.epochs has no effect"]),
        ("moram-trace", {"train.epochs": "1"}, ["under text.epochs 2,1,3,2,1,2,2,3"]),
        ("digits-dil", {"memory.topk": "3"}, ["under memory.separation softmax"]),
        ("digits-dil", {"memory.topk": "3", "memory.separation": "topk"}, []),
        ("modulation-digits", {"baselines": "frozen", "seed": "1"}, ["under stream.setting mts"]),
        ("moram-digits", {"head.scope": "task", "train.epochs": "1"}, []),
        ("mira-vil", {"stream.class_order": "given", "stream.order": "a@b"}, []),
    ],
)
def test_what_is_asked_for_in_vain(preset, overrides, sentences):
    found = resolve(preset=preset, overrides=overrides, environ={}).without_effect()
    assert len(found) == len(sentences)
    assert all(wanted in sentence for wanted, sentence in zip(sentences, found, strict=True))


def test_only_what_was_asked_for_can_be_in_vain():
    write(user_file(), "moram: {topk: 8}")
    assert resolve(environ={}).without_effect() == ()
    asked = resolve(environ={"MEMTOOL_MORAM__TOPK": "9"}).without_effect()
    assert asked == ("moram.topk has no effect under method mira: it is of method moram",)


def test_what_settings_are_read_under_is_made_of_settings():
    for name, other, values in READ_UNDER:
        assert any(key == name or key.startswith(f"{name}.") for key in keys()), name
        assert other in keys()
        assert set(values) - {None} <= set(choices(other))
