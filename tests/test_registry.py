"""Names of other people's packages: found, refused with what is wrong, and never run unasked."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

from memtool import registry
from memtool.backbones import create_backbone
from memtool.config import resolve
from memtool.errors import ConfigError, MismatchError, NotFoundError
from memtool.memories.separation import separation
from memtool.settings import BackboneSettings, Config, keys

METHOD = """
from pydantic import Field
from memtool import Settings

class MySettings(Settings):
    k: int = Field(3, ge=1, description="how many")
    words: tuple[str, ...] = ("a",)

class Mine:
    name = "nearest-mean"
    Settings = MySettings
    open = adapt = write = consolidate = retrieve = evaluate = classmethod(lambda cls, *a, **b: cls)

class Half:
    name = "half"
    open = adapt = write = Mine.open

word = "no class"
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file of a method in the working directory, which is no longer on the path afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "user" / name)
    before = set(sys.modules)
    file = tmp_path / "plugin_of_the_test.py"
    file.write_text(METHOD)
    yield file
    for name in set(sys.modules) - before:
        if "plugin_of_the_test" in name or "broken" in name:
            del sys.modules[name]


@pytest.fixture
def package(plugin, tmp_path, monkeypatch):
    """The same, installed: a distribution with entry points on the path."""
    site = tmp_path / "site"
    about = site / "their_package-1.2.dist-info"
    about.mkdir(parents=True)
    plugin.rename(site / plugin.name)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(
        "[memtool.methods]\nnearest = plugin_of_the_test:Mine\ngone = plugin_of_the_test:Gone\n"
        "mira = plugin_of_the_test:Mine\n"
        "[memtool.baselines]\nguess = plugin_of_the_test:Mine\n"
        "[memtool.backbones]\nword = plugin_of_the_test:Mine\n"
    )
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize("kind", registry.SHIPPED)
def test_every_name_that_ships_is_there(kind):
    for name, where in registry.SHIPPED[kind].items():
        module, _, attribute = where.partition(":")
        assert getattr(import_module(module), attribute) is registry.find(kind, name)


def test_naming_what_ships_imports_nothing():
    code = (
        "import sys; from memtool import registry; from memtool.config import resolve; "
        "assert registry.known('methods', 'mira'); resolve(preset='moram', environ={}); "
        "sys.exit(' '.join(m for m in ('torch', 'numpy', 'memtool.methods') if m in sys.modules))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "\n")


@pytest.mark.parametrize("form", ["plugin_of_the_test:Mine", "plugin_of_the_test.py:Mine"])
def test_a_class_is_found_by_its_module_or_file(plugin, form):
    assert registry.find("methods", form).name == "nearest-mean"
    assert registry.find("methods", form) is registry.find("methods", form)


def test_an_entry_point_is_a_name(package):
    assert registry.find("methods", "nearest").name == "nearest-mean"
    assert registry.existing("methods") == ("mira", "moram", "modulation", "nearest", "gone")
    assert registry.find("methods", "mira").__module__.startswith("memtool.")
    with pytest.raises(ConfigError, match=r"gone of the package their-package 1\.2.*no 'Gone'"):
        registry.find("methods", "gone")
    with pytest.raises(ConfigError) as caught:
        registry.find("methods", "neerest")
    assert "'nearest'" in (caught.value.expected or "")
    assert resolve(environ={}, overrides={"baselines": "guess,ewc"}).config.baselines == (
        "guess",
        "ewc",
    )


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("", "nowhere:Mine", "there is no module nowhere"),
        ("", "no/where.py:Mine", "there is no file no/where.py"),
        ("import not_there", "broken.py:Mine", "No module named 'not_there' .*broken.py:1"),
        ("\nraise RuntimeError('no GPU here')", "broken.py:Mine", "RuntimeError: no GPU here .*:2"),
        ("class Own(Exception): ...\nraise Own('x')", "broken:Mine", "broken cannot .*Own: x .*:2"),
        ("\nclass Mine\n", "broken.py:Mine", "SyntaxError: .*broken.py:2"),
        ("class Mina: ...", "broken.py:Mine", "broken.py has no 'Mine'"),
        ("Mine = 3", "broken.py:Mine", "Mine is a int"),
        (METHOD, "broken.py:Half", "the class Half has no consolidate, retrieve, evaluate"),
        (
            "from memtool.methods.method import Method\nclass Mine(Method): ...",
            "broken.py:Mine",
            "the class Mine has no .*retrieve",
        ),
        ("", "broken.py:", "broken.py has no ''"),
        ("", ":Mine", "cannot be imported: ValueError"),
    ],
)
def test_a_method_that_cannot_be_used_is_told(plugin, content, name, said):
    (plugin.parent / "broken.py").write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        resolve(environ={}, overrides={"method": name})
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("Settings = 3", "no model of settings"),
        ("class Settings(BaseModel): ...", "no model of settings"),
        ("class Settings(Base): k: int", "setting k: Field required"),
        ("class Settings(Base):\n        k: MemorySettings = MemorySettings()", "section of a"),
        ("Settings = Base; name = 'a b'", "name is 'a b'"),
        ("Settings = Base; name = None", "name is None"),
        ("Settings = Base; name = 'train'", "'train' would be another one"),
        ("Settings = Base; name = 'moram'", "'moram' would be another one"),
        ("Settings = Base; name = 'recorded'", "'recorded' would be another one"),
    ],
)
def test_settings_that_cannot_be_a_section_are_told(plugin, settings, said):
    (plugin.parent / "broken.py").write_text(
        f"{METHOD}\nfrom pydantic import BaseModel\nfrom memtool.sections import MemorySettings\n"
        f"Base = Settings\nclass Theirs(Mine):\n    {settings}\n"
    )
    with pytest.raises(ConfigError, match=said):
        resolve(environ={}, overrides={"method": "broken.py:Theirs"})


NAME = "plugin_of_the_test.py:Mine"


def test_the_section_of_a_method_is_set_as_any_other(plugin):
    file = plugin.parent / "given.yaml"
    file.write_text(f"method: {NAME}\nnearest_mean:\n  k: 4\n  words: [b, c]\n")
    found = resolve(file=file, environ={})
    assert found.config.nearest_mean.k == 4
    assert found.config.nearest_mean.words == ("b", "c")
    assert found.origin["nearest_mean.k"] == f"{file}:3"
    assert "memory.beta" not in keys(NAME)
    assert "past.energy" in found.origin  # baselines read it
    more = resolve(file=file, environ={"MEMTOOL_NEAREST_MEAN__K": "5"})
    assert more.config.nearest_mean.k == 5
    assert more.origin["nearest_mean.k"] == "MEMTOOL_NEAREST_MEAN__K"
    last = resolve(file=file, environ={}, overrides={"nearest_mean.words": "d,e"})
    assert last.config.nearest_mean.words == ("d", "e")
    recorded = last.config.recorded()
    assert recorded["nearest_mean"] == {"k": 4, "words": ["d", "e"]}
    assert Config.model_validate(recorded) == last.config
    file.write_text(f"method: {NAME}\nnearest_mean:\n  kk: 4\n")
    with pytest.raises(ConfigError, match=r"given.yaml:3: no setting 'nearest_mean.kk'"):
        resolve(file=file, environ={})
    with pytest.raises(ConfigError, match=r"command line: nearest_mean.k cannot be '0'"):
        resolve(environ={}, overrides={"method": NAME, "nearest_mean.k": "0"})
    with pytest.raises(ConfigError, match=r"no setting 'nearest_mean.k'"):
        resolve(environ={}, overrides={"nearest_mean.k": "1"})


def test_a_file_for_another_method_is_passed_over_where_it_names_it(plugin):
    file = plugin.parent / "given.yaml"
    file.write_text(f"method: {NAME}\nnearest_mean: {{k: 4}}\ntrain: {{epochs: 3}}\n")
    found = resolve(file=file, environ={}, overrides={"method": "moram"}).config
    assert (found.method, found.train.epochs) == ("moram", 3)
    assert not hasattr(found, "nearest_mean")


def test_what_only_asks_the_store_imports_no_method(plugin):
    (plugin.parent / "memtool.yaml").write_text(
        "method: broken.py:Mine\nstore: theirs\nmine: {k: 4}\nmodulation: {hidden: 3}\n"
    )
    found = resolve(environ={"MEMTOOL_MINE__K": "5"}, overrides={"mine.k": 6}, of_store=True)
    assert found.config.store == "theirs"
    with pytest.raises(ConfigError, match=r"names code"):
        resolve(environ={})


def test_no_code_runs_because_a_memory_names_it(plugin, package):
    made_with = {"method": "site/plugin_of_the_test.py:Mine", "nearest_mean.k": 8}
    with pytest.raises(NotFoundError, match=r"'site/plugin_of_the_test.py:Mine'") as caught:
        resolve(environ={}, remembered=made_with)
    assert caught.value.remedy == "--method site/plugin_of_the_test.py:Mine"
    assert not any("plugin_of_the_test" in name for name in sys.modules)
    named = {"method": "site/plugin_of_the_test.py:Mine"}
    found = resolve(environ={}, remembered=made_with, overrides=named)
    assert found.config.nearest_mean.k == 8
    installed = resolve(environ={}, remembered={**made_with, "method": "nearest"})
    assert installed.config.nearest_mean.k == 8
    assert installed.origin["nearest_mean.k"] == "the memory"
    with pytest.raises(NotFoundError, match="method 'farthest', which is not installed here"):
        resolve(environ={}, remembered={"method": "farthest"})
    for name in ("site/x.py:Net", "os:system"):
        with pytest.raises(NotFoundError, match=f"backbone '{name}', which is not installed"):
            resolve(environ={}, remembered={"backbone.name": name})
    with pytest.raises(NotFoundError, match="method 'subprocess:Popen', which is not installed"):
        resolve(environ={}, remembered={"method": "subprocess:Popen"})


def test_what_a_memory_says_of_another_method_is_passed_over(plugin):
    made_with = {"method": "mira", "memory.beta": 2.0, "zzz.k": 1, "moram.topk": 3}
    assert resolve(environ={}, remembered=made_with).config.memory.beta == 2.0
    found = resolve(environ={}, remembered=made_with, overrides={"method": "moram"})
    assert found.config.moram.topk == 3
    assert "memory.beta" not in found.origin


BACKBONE = """
from memtool.backbones.nano import create_nano
seen = []
def mine(settings, model="none"):
    seen.append(model)
    return create_nano(settings.model_copy(update={"name": "nano"}))
def wrong(settings, model="none"):
    return 3
"""


def test_a_backbone_of_another_package(package, tmp_path):
    file = tmp_path / "site" / "plugin_of_the_test.py"
    file.write_text(BACKBONE)
    name = f"{file}:mine"
    assert create_backbone(BackboneSettings(name=name)).depth > 0
    entries = tmp_path / "site" / "their_package-1.2.dist-info" / "entry_points.txt"
    entries.write_text("[memtool.backbones]\ntheirs = plugin_of_the_test:mine\n")
    for given in ("theirs", "theirs:small"):
        create_backbone(BackboneSettings(name=given))
    assert import_module("plugin_of_the_test").seen == ["none", "small"]
    with pytest.raises(ConfigError, match="is a int"):
        create_backbone(BackboneSettings(name=f"{file}:wrong"))
    with pytest.raises(ConfigError) as caught:
        create_backbone(BackboneSettings(name="tinm:vit_tiny"))
    assert "'timm'" in (caught.value.expected or "")


def test_an_unknown_baseline_is_told():
    with pytest.raises(ConfigError, match="command line: baselines cannot be 'ewk'") as caught:
        resolve(environ={}, overrides={"baselines": "frozen,ewk"})
    assert "did you mean 'ewc'?" in (caught.value.expected or "")


SEPARATION = """
import torch
def squared(scores, beta=1.0):
    powers = (beta * scores).square()
    return powers / powers.sum(dim=-1, keepdim=True)
def flat(scores):
    return scores.sum(dim=-1)
def word(scores):
    return "all"
def none(scores):
    return scores / 0
three = 3
"""


@pytest.fixture
def cube(plugin, monkeypatch):
    """A file of separations, and its path as a name begins with it."""
    monkeypatch.setattr(registry, "_FOUND", set())
    plugin.write_text(SEPARATION)
    return plugin.name


def test_a_separation_of_another_file(cube):
    name = f"{cube}:squared"
    found = resolve(environ={}, overrides={"memory.separation": name}).config
    assert found.memory.separation == name
    separate = separation(name, beta=2.0, topk=3)
    scores = torch.tensor([[1.0, 2.0, -1.0]])
    torch.testing.assert_close(separate(scores), torch.tensor([[1.0, 4.0, 1.0]]) / 6)
    for wrong, said in (
        ("flat", r"flat gave \(1,\) for scores of shape \(1, 3\)"),
        ("word", "word gave str"),
        ("none", "none gave numbers that are not finite"),
    ):
        resolve(environ={}, overrides={"memory.separation": f"{cube}:{wrong}"})
        with pytest.raises(MismatchError, match=said):
            separation(f"{cube}:{wrong}")(scores)
    for key, wrong, said in (
        ("memory.separation", f"{cube}:three", "three is a int"),
        ("memory.separation", f"{cube}:cubed", "has no 'cubed'"),
        ("memory.separation", "softmx", "memory.separation cannot be 'softmx'"),
        ("modulation.separation", "no/where.py:f", "there is no file no/where.py"),
    ):
        method = "modulation" if key.startswith("modulation") else "mira"
        with pytest.raises(ConfigError, match=said):
            resolve(environ={}, overrides={"method": method, key: wrong})


def test_no_separation_runs_because_a_memory_names_it(cube):
    name = f"{cube}:squared"
    made_with = {"method": "mira", "memory.separation": name}
    with pytest.raises(NotFoundError, match="made with the separation") as caught:
        resolve(environ={}, remembered=made_with)
    assert caught.value.remedy == f"--set memory.separation={name}"
    for named in (name, "os:system"):
        with pytest.raises(NotFoundError, match="made with the separation"):
            separation(named)
    assert not any("plugin_of_the_test" in module for module in sys.modules)
    resolve(environ={}, remembered=made_with, overrides={"memory.separation": name})
    assert resolve(environ={}, remembered=made_with).config.memory.separation == name


@pytest.mark.parametrize(
    "line",
    [
        "method: {}",
        "baselines: [all, '{}']",
        "backbone: {{name: '{}'}}",
        "memory: {{separation: '{}'}}",
    ],
)
@pytest.mark.parametrize("named", ["evil.py:Evil", "evil:Evil"])
def test_a_file_that_lies_in_the_folder_runs_no_code(tmp_path, monkeypatch, line, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Evil: pass\n")
    (tmp_path / "memtool.yaml").write_text(line.format(named))
    with pytest.raises(ConfigError, match=r"memtool\.yaml:1: .* names code"):
        resolve(environ={}, cwd=tmp_path)
    assert not (tmp_path / "ran").exists()
    # A file that is named is followed: here to a class that is no method.
    wrong = r"no class|has no|lacks" if line.startswith("method") else None
    refused = pytest.raises(ConfigError, match=wrong) if wrong else nullcontext()
    with refused:
        resolve(environ={}, cwd=tmp_path, file=Path("memtool.yaml"))
