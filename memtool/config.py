"""The configuration of an experiment, and where each of its values comes from.

Precedence, highest first: command line, MEMTOOL_* variables, --config file, memtool.yaml in the
working directory, the user's file, the preset, the defaults here (`resolve`). A setting has a
dotted key, `adapter.rank`; as a variable it is MEMTOOL_ADAPTER__RANK.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import platformdirs
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from memtool import registry
from memtool.errors import ConfigError, NotFoundError, did_you_mean
from memtool.paths import at_home
from memtool.sections import OF_BASELINES, SECTIONS, owners_of
from memtool.settings import (
    DEFAULT_METHOD,
    READ_UNDER,
    Config,
    choices,
    get,
    keys,
    named,
    sections,
)
from memtool.yaml_file import Node, parse_yaml, read_yaml
from memtool_stores.printable import printable, shown


@dataclass(frozen=True)
class Resolved:
    """A configuration, the preset below it, and for every dotted key where its value is from.

    An origin is "default", "preset <name>", "<file>:<line>", the name of a variable, "command line"
    or "the memory", below which there is no preset. `foreign` has the settings of other methods
    that were passed over, with the places that set them.
    """

    config: Config
    origin: dict[str, str]
    preset: str | None
    foreign: dict[str, str] = field(default_factory=dict)

    def without_effect(self, *, reads: Sequence[str] = ()) -> tuple[str, ...]:
        """Sentences on what was asked for in vain, as `READ_UNDER` says: one a setting.

        Asked for are settings of the command line and of variables; a file or preset may hold some
        for other methods. `reads` names the settings and sections of a verb that reads no others;
        a variable that is for other verbs is not asked for in vain then.
        """
        found = []
        for key, place in {**self.origin, **self.foreign}.items():
            if reads:
                if place == COMMAND_LINE and key.partition(".")[0] not in reads:
                    found.append(f"{key} has no effect here: nothing but the store is read")
            elif place == COMMAND_LINE or place.startswith("MEMTOOL_"):
                if key in self.foreign:
                    found.append(
                        f"{key} has no effect under method {self.config.method}: it is of method "
                        + " and ".join(owners_of(key.partition(".")[0]))
                    )
                    continue
                other = not_read_under(self.config, key)
                if other is not None:
                    value = get(self.config, other)
                    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                    found.append(f"{key} has no effect under {other} {shown}")
        return tuple(found)


@dataclass(frozen=True)
class Preset:
    """A file of settings that ships with memtool; `launch` is the command in its first line."""

    name: str
    path: Path
    launch: str
    summary: str


DEFAULT_PRESET = "digits-dil"
WORKING_FILE = "memtool.yaml"
NAMES_OF_CODE: Mapping[str, registry.Kind] = {
    "method": "methods",
    "baselines": "baselines",
    "backbone.name": "backbones",
    "memory.separation": "separations",
    "modulation.separation": "separations",
}
"""Settings whose words may be modules or files of Python, and of which kind."""
COMMAND_LINE = "command line"
MEMORY = "the memory"
"""Origin of what a memory was made with."""
NOT_SETTINGS = frozenset(
    {"MEMTOOL_DATA", "MEMTOOL_CACHE", "MEMTOOL_VLLM_STORES", "MEMTOOL_API_KEY"}
)


def resolve(
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    ambient: bool = True,
    remembered: Mapping[str, Any] | None = None,
    of_store: bool = False,
) -> Resolved:
    """The configuration in force, each value from the highest place that sets it.

    `overrides` are the values of the command line by dotted key. Text (there and in variables) is
    read by the type of the setting: "0,1,2" for several values, "none" for no value. Without
    `ambient`, only what the arguments name counts: no variables, working or user file.
    `remembered` are the settings that a memory was made with, by dotted key: they stand where
    nothing else was said, and a preset was not named. With `of_store` only what says where the
    memory is counts: a method of other people is not imported, and sections that only it may know
    are passed over.

    Settings of other methods are passed over, too: presets and the user's file hold some for
    several. In another file they are an error, unless it names a method that has them.

    Raises ConfigError for those, for an unknown key and for a value that cannot be used, with its
    place; NotFoundError for a preset or a file that is not there, and for a memory whose method or
    backbone is not here.

    >>> found = resolve(preset="digits-dil", overrides={"adapter.rank": "2"}, ambient=False)
    >>> found.config.adapter.rank, found.origin["adapter.rank"], found.origin["train.lr"]
    (2, 'command line', 'default')
    >>> resolve(overrides={"adapter.rnk": 2}, ambient=False)
    Traceback (most recent call last):
    ...
    memtool_stores.errors.ConfigError: ...
    """
    cwd = Path.cwd() if cwd is None else cwd
    environ = (os.environ if environ is None else environ) if ambient else {}
    overrides = overrides or {}
    chosen = find_preset(preset or DEFAULT_PRESET)
    base = None if remembered and preset is None else chosen.name
    made_with = {} if remembered is None or base else remembered
    files = [] if base is None else [_File.read(chosen.path, f"preset {base}", lines=False)]
    for path in (user_file(), cwd / WORKING_FILE) if ambient else ():
        if os.path.exists(path):  # noqa: PTH110 - False where nobody may look
            files.append(_File.read(path, _shown(path, cwd)))
            by_hand = file is not None and cwd / at_home(file) == path
            if path.name == WORKING_FILE and not (by_hand or of_store):
                files[-1].require_no_code()
    if file is not None:
        files.append(_File.read(cwd / at_home(file), str(file)))
    method, said_by = _method(overrides, environ, files, made_with)
    for_all = [chosen.path, user_file(), *([cwd / WORKING_FILE] if said_by == MEMORY else [])]
    if of_store and method not in SECTIONS:
        method = DEFAULT_METHOD
    known = keys(method)
    origin = dict.fromkeys(known, "default")
    foreign: dict[str, str] = {}
    values: dict[str, Any] = {}

    def put(layer: Mapping[str, tuple[Any, str]]) -> None:
        for key, (value, place) in layer.items():
            if key not in known:
                foreign[key] = place
                continue
            _require_text(key, value, place)
            values[key] = _as_field(known[key], value, place)
            origin[key] = place

    put({key: (value, MEMORY) for key, value in made_with.items() if key in known})
    for one in files:
        passes = of_store or one.path in for_all
        put(one.settings(method, passes=passes, of_store=of_store))
    put(_from_environment(environ, method, of_store))
    for key in overrides:
        if not (of_store and _may_be_of_others(key)):
            _require_key(key, COMMAND_LINE, known)
    put({key: (value, COMMAND_LINE) for key, value in overrides.items()})
    if of_store:
        values["method"] = method
    if origin["backbone.name"] == MEMORY and not of_store:
        name = str(values["backbone.name"])
        if not registry.is_installed("backbones", name.partition(":")[0]):
            registry.require_installed("backbones", name, f"--set backbone.name={name}")
    config = _validated(values, origin, method)
    if not of_store:
        _find_separations(config, origin)
    return Resolved(config, origin, base, foreign)


def with_values(config: Config, values: Mapping[str, Any], place: str) -> Config:
    """The configuration with other values for some dotted keys, text as on the command line.

    Raises ConfigError, which names the place, for an unknown key and a value that cannot be used.
    """
    known = keys(config.method)
    for key in values:
        _require_key(key, place, known)
    whole = {key: get(config, key) for key in known}
    whole |= {key: _as_field(known[key], value, place) for key, value in values.items()}
    return _validated(whole, dict.fromkeys(known, place), config.method)


def user_file() -> Path:
    """The user's own settings, in the folder that the operating system has for them."""
    return platformdirs.user_config_path("memtool") / "config.yaml"


def presets() -> tuple[Preset, ...]:
    """The presets that ship with memtool, by name."""
    found = []
    for path in sorted((Path(__file__).parent / "presets").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        found.append(Preset(path.stem, path, comments[0], comments[1]))
    return tuple(found)


RENAMED = {f"mira-{setting}-paper": f"mira-{setting}-authors" for setting in ("dg", "cil", "dil")}
"""What presets of earlier versions became."""


def find_preset(name: str) -> Preset:
    """A preset by name. Raises NotFoundError; for a name of an earlier version it says the new."""
    known = {preset.name: preset for preset in presets()}
    if name in RENAMED:
        raise NotFoundError(
            f"preset {name} is no more: it was our reading of the paper, and the code of its "
            "authors says otherwise",
            expected=f"{RENAMED[name]}, as that code has it",
            remedy=f"--preset {RENAMED[name]}",
        )
    if name not in known:
        raise NotFoundError(
            f"no preset {name!r}",
            expected=did_you_mean(name, known),
            remedy="memtool config presets",
        )
    return known[name]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `resolve(file=...)` on it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_assignment(text: str) -> tuple[str, str]:
    """`"adapter.rank=8"` as key and text, for --set. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {shown(text)}", expected="KEY=VALUE, as --set adapter.rank=8")
    return key.strip(), value.strip()


def not_read_under(config: Config, key: str) -> str | None:
    """The setting whose value makes a setting one that nothing reads, or None."""
    for name, other, values in READ_UNDER:
        if other == "method" and config.method not in SECTIONS:
            continue  # nobody knows what it reads
        named = key == name or key.startswith(f"{name}.")
        if named and get(config, other) not in values and not not_read_under(config, other):
            return other
    return None


def _may_be_of_others(key: str) -> bool:
    """Whether a key lies in a section that only a method of other people can have."""
    section, dot, _ = key.partition(".")
    return bool(dot) and not any(known.startswith(f"{section}.") for known in keys())


def is_record(file: Path) -> bool:
    """Whether a file of settings is the record of a run, whose configuration counts then."""
    return file.suffix == ".json"


def _of_record(path: Path, name: str) -> Node:
    """The configuration of a record. Raises NotFoundError, CorruptError, ConfigError."""
    from memtool import sealed  # it needs numpy, which a plain configuration does not

    try:
        document = sealed.parse_json(sealed.read_file(path, "text_bytes"), name).content
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {name}", remedy="memtool run") from error
    run = document.get("run")
    said = run.get("configuration") if isinstance(run, dict) else None
    if not isinstance(said, dict):
        raise ConfigError(
            f"{name} is no record of a run",
            expected="record.json of `memtool run`, or settings in YAML",
        )
    found = parse_yaml(yaml.safe_dump(said, allow_unicode=True), name)
    assert found is not None
    return found


@dataclass(frozen=True)
class _File:
    """A YAML file of settings, the name by which it is told, and whether its lines are, too."""

    path: Path
    name: str
    tree: Node | None
    lines: bool

    @classmethod
    def read(cls, path: Path, name: str, *, lines: bool = True) -> _File:
        name = printable(name)
        if is_record(path):
            return cls(path, name, _of_record(path, name), lines=False)
        return cls(path, name, read_yaml(path, name, remedy=f"memtool init {name}"), lines)

    @property
    def method(self) -> tuple[Any, str] | None:
        """The method that it names and the place, or None."""
        if self.tree is None or not isinstance(self.tree.value, dict):
            return None
        node = self.tree.value.get("method")
        return None if node is None else (node.plain(), self._at(node))

    def require_no_code(self) -> None:
        """Raise ConfigError where it names a module or a file of Python that is not installed.

        The folder where somebody starts memtool may be a stranger's.
        """
        for key, kind in NAMES_OF_CODE.items():
            node = self.tree
            for part in key.split("."):
                inside = node.value if node is not None else None
                node = inside.get(part) if isinstance(inside, dict) else None
            named = None if node is None else node.plain()
            for name in named if isinstance(named, list) else str(named or "").split(","):
                text = str(name).strip()
                family = text.partition(":")[0]
                if ":" not in text or family in registry.existing(kind):
                    continue
                if not registry.is_installed(kind, text):
                    assert node is not None
                    raise ConfigError(
                        f"{self._at(node)}: {key} names code, {shown(text)}, and a file that is "
                        "read because it lies in this folder runs none",
                        expected="what ships, or what an installed package has",
                        remedy=f"--config {self.path.name}, for a file that you trust",
                    )

    def settings(self, method: str, *, passes: bool, of_store: bool) -> dict[str, tuple[Any, str]]:
        """The settings: dotted key to (value, place). `passes` lets those of all methods pass."""
        found: dict[str, tuple[Any, str]] = {}
        known = keys(method)
        parts = {key.partition(".")[0] for key in (*keys(), *known) if "." in key}
        own = self.method[0] if self.method is not None else method
        of_another = isinstance(own, str) and own not in (*SECTIONS, method)

        def visit(node: Node, prefix: str) -> None:
            if node.value is None:
                return
            if not isinstance(node.value, dict):
                raise self._not_settings(node, prefix, known)
            for word, inner in node.value.items():
                key, place = f"{prefix}{word}", self._at(inner)
                if key in parts:
                    visit(inner, f"{key}.")
                    continue
                section = inner.value is None or isinstance(inner.value, dict)
                whose = f"{key}." if section and "." not in key else key
                if (of_store or of_another) and _may_be_of_others(whose):
                    continue
                _require_key(key, place, known)
                if not passes and key not in known:
                    self._require_own(key, place, method, own)
                if key in found:
                    raise ConfigError(f"{place}: {key} is set twice, first at {found[key][1]}")
                found[key] = (inner.plain(), place)

        if self.tree is not None:
            visit(self.tree, "")
        return found

    def _at(self, node: Node) -> str:
        return f"{self.name}:{node.line}" if self.lines else self.name

    def _not_settings(self, node: Node, prefix: str, known: Mapping[str, Any]) -> ConfigError:
        subject = f"{prefix[:-1]!r} is a section, not a value" if prefix else "no settings here"
        inside = [key for key in {**keys(), **known} if key.startswith(prefix)]
        return ConfigError(
            f"{self.name}:{node.line}: {subject}",
            expected=f"lines `key: value`, with keys such as {', '.join(inside[:4])}",
        )

    def _require_own(self, key: str, place: str, method: str, own: Any) -> None:
        """Raise ConfigError for a setting of another method than the file is for.

        A file is for the method that it names; one that has the sections of all is for all. An
        older one of these lacks what baselines came to read.
        """
        assert self.tree is not None
        assert isinstance(self.tree.value, dict)
        section = key.partition(".")[0]
        owners = owners_of(section)
        here = {word.partition(".")[0] for word in self.tree.value}
        every = {name for parts in SECTIONS.values() for name in parts if name not in OF_BASELINES}
        if own in owners or here >= every:
            return
        raise ConfigError(
            f"{place}: {section!r} is a section of method {' and '.join(owners)}, and the method "
            f"is {method}",
            expected=f"for method {method}: " + ", ".join(sections(method)),
            remedy=f"`method: {owners[0]}` in {self.name}, or --method {owners[0]}",
        )


def _method(
    overrides: Mapping[str, Any],
    environ: Mapping[str, str],
    files: Sequence[_File],
    made_with: Mapping[str, Any],
) -> tuple[str, str]:
    """The method from the highest place that says it, and the place; it could be one by its name.

    Raises ConfigError, NotFoundError.
    """
    variable = _variable("method")
    said: list[tuple[Any, str]] = [(DEFAULT_METHOD, "default")]
    said += [(made_with["method"], MEMORY)] if "method" in made_with else []
    said += [one.method for one in files if one.method is not None]
    said += [(environ[variable], variable)] if variable in environ else []
    said += [(overrides["method"], COMMAND_LINE)] if "method" in overrides else []
    method, place = said[-1]
    _require_text("method", method, place)
    if isinstance(method, str) and place == MEMORY:
        registry.require_installed("methods", method, f"--method {method}")
    if not isinstance(method, str) or not registry.known("methods", method):
        raise ConfigError(
            f"{place}: method cannot be {shown(method)}",
            expected=did_you_mean(str(method), registry.existing("methods")),
        )
    return method, place


def _find_separations(config: Config, origin: Mapping[str, str]) -> None:
    """Import separations of other packages that a person named; none because a memory names it."""
    for key, about in keys(config.method).items():
        mark = named(about)
        if mark is None or mark.kind != "separations":
            continue
        name = get(config, key)
        if origin[key] == MEMORY:
            registry.require_installed(mark.kind, name, f"--set {key}={name}")
        elif name not in registry.SHIPPED[mark.kind]:
            registry.find(mark.kind, name)


def _from_environment(
    environ: Mapping[str, str], method: str, of_store: bool
) -> dict[str, tuple[Any, str]]:
    names = {_variable(key): key for key in (*keys(), *keys(method))}
    found = {}
    for name in sorted(environ):
        if not name.startswith("MEMTOOL_") or name in NOT_SETTINGS:
            continue
        key = name.removeprefix("MEMTOOL_").replace("__", ".").lower()
        if of_store and _may_be_of_others(key):
            continue
        if name not in names:
            close = difflib.get_close_matches(name, [*names, *NOT_SETTINGS], n=1)
            raise ConfigError(
                f"{printable(name)}: no such setting",
                expected=f"did you mean {close[0]}?"
                if close
                else "MEMTOOL_ and a key of `memtool config show`, as MEMTOOL_ADAPTER__RANK",
                remedy=f"unset {printable(name)}",
            )
        found[names[name]] = (environ[name], name)
    return found


def _variable(key: str) -> str:
    return "MEMTOOL_" + key.replace(".", "__").upper()


def _require_key(key: str, place: str, known: Mapping[str, FieldInfo]) -> None:
    """Raise ConfigError for what is neither a setting of the method nor of one that ships."""
    if key in known or key in keys():
        return
    same_word = [one for one in known if one.rpartition(".")[2] == key]
    close = same_word or difflib.get_close_matches(key, {**known, **keys()}, n=1)
    section = key.partition(".")[0] + "."
    inside = [one for one in {**known, **keys()} if one.startswith(section)]
    if close:
        expected = "did you mean " + " or ".join(repr(one) for one in close) + "?"
    else:
        expected = (
            f"one of {', '.join(inside or dict.fromkeys(k.partition('.')[0] for k in known))}"
        )
    raise ConfigError(
        f"{place}: no setting {shown(key)}", expected=expected, remedy="memtool config show"
    )


def _require_text(key: str, value: Any, place: str) -> None:
    """Raise ConfigError for text that no path and no file of ours can hold."""
    for text in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
            raise ConfigError(
                f"{place}: {key} cannot be {shown(text)}", expected="text without NUL, in UTF-8"
            )


def _as_field(about: FieldInfo, value: Any, place: str) -> Any:
    """Text and single values in the form of the field: several, or none."""
    annotation = about.annotation
    arms = get_args(annotation)
    if isinstance(value, str) and NoneType in arms and value.lower() in ("", "none", "null"):
        return None
    several = next((arm for arm in (annotation, *arms) if get_origin(arm) is tuple), None)
    if several is None:
        return value
    if isinstance(value, str):
        value = split_values(value.strip("[]"))
    elif value is not None and not isinstance(value, (list, tuple)):
        return (value,)
    if value is not None and _holds_whole_numbers(several):
        return tuple(number for part in value for number in whole_numbers(part, place))
    return value


def split_values(text: str, separator: str = ",") -> tuple[str, ...]:
    """The values that a text lists: `"0, 1"` as `("0", "1")`; empty ones are left out."""
    return tuple(part.strip() for part in text.split(separator) if part.strip())


_RANGE = re.compile(r"(\d{1,16})\.\.(\d{1,16})")

MOST_IN_RANGE = 10_000
"""A range of more numbers is a slip of the keyboard."""


def whole_numbers(value: Any, place: str) -> tuple[Any, ...]:
    """What text for whole numbers lists: `"0..2,7"` as `(0, 1, 2, "7")`; anything else as it is.

    Both ends of a range are in it. Raises ConfigError, which names the place, for one that falls or
    is too long.
    """
    if not isinstance(value, str):
        return (value,)
    found: list[Any] = []
    for part in split_values(value):
        match = _RANGE.fullmatch(part)
        if match is None:
            found.append(part)
            continue
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MOST_IN_RANGE:
            raise ConfigError(
                f"{place}: the range {part}",
                expected=f"FIRST..LAST, rising, of at most {MOST_IN_RANGE:,} numbers, as 0..4",
            )
        found += range(first, last + 1)
    return tuple(found) or (value,)


def _holds_whole_numbers(several: Any) -> bool:
    """Whether the values of a setting that holds several, `tuple[int, ...]`, are whole numbers."""
    inside = get_args(several)[0]
    return inside is int or get_args(inside)[:1] == (int,)


def _validated(values: Mapping[str, Any], origin: Mapping[str, str], method: str) -> Config:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        known = keys(method)
        key = next(k for n in (2, 1) if (k := ".".join(path[:n])) in known)
        mark = named(known[key])
        wanted = (*mark.also, *registry.existing(mark.kind)) if mark else choices(key, method)
        raise ConfigError(
            f"{origin[key]}: {key} cannot be {shown(first['input'])}",
            expected=did_you_mean(str(first["input"]), wanted)
            if wanted
            else first["msg"].removeprefix("Input should be ").removeprefix("Value error, "),
        ) from error


def _shown(path: Path, cwd: Path) -> str:
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
