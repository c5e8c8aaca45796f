"""Descriptions: YAML files that say where a data set is and what its columns mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from memtool.errors import ConfigError, NotFoundError, did_you_mean
from memtool.paths import expand
from memtool.yaml_file import read_yaml
from memtool_stores.printable import printable, shown

Model = TypeVar("Model", bound=BaseModel)


class Description(BaseModel):
    """One data set in YAML; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    licence: str = ""
    kind: Literal[
        "parquet", "json", "csv", "imagefolder", "saved", "hub", "folder", "chain", "join"
    ]
    path: str = ""
    config: str | None = None
    revision: str | None = None
    train: str | tuple[str, ...] = "train"
    test: str | tuple[str, ...] = ()
    image: str = "image"
    label: str = "label"
    domain: str | None = None
    class_names: tuple[str, ...] | None = None
    domain_names: tuple[str, ...] | None = None
    separate_classes: bool = False
    """Every part has classes of its own; their names become part/name."""
    sources: tuple[str, ...] = ()
    """Of a chain or join: the data sets, by name or by the path of a description."""
    prompts: dict[str, str] = {}
    """Of a chain: templates of the prompts by data set, with {} for the class name."""


def read_description(file: Path) -> Description:
    """Parse and validate one YAML description; ConfigError names the file, the line and the key."""
    description = read_model(file, Description)
    several = description.kind in ("chain", "join")
    needed, other = ("sources", "path") if several else ("path", "sources")
    name = printable(str(file))
    if not getattr(description, needed):
        raise ConfigError(f"{name}: the key {needed!r} is missing")
    if getattr(description, other):
        raise ConfigError(f"{name}: kind {description.kind} has no {other}")
    for key in ("class_names", "domain_names"):
        names = getattr(description, key) or ()
        twice = next((one for one in names if names.count(one) > 1), None)
        if twice is not None:
            raise ConfigError(f"{name}: {key} names {shown(twice)} twice")
    return description


def read_model(file: Path, model: type[Model], inside: Iterable[str] = ()) -> Model:
    """What a YAML file says, as a model; `inside` are keys of its parts.

    Raises NotFoundError where there is no file, ConfigError that names the file, the line and the
    key.
    """
    name = printable(str(file))
    tree = read_yaml(file, name, remedy="check the path")
    if tree is None or not isinstance(tree.value, dict):
        raise ConfigError(f"{name}: not a description", expected="keys such as kind and path")
    try:
        return model.model_validate(tree.plain())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = printable(".".join(str(part) for part in first["loc"]))
        node = tree.value.get(str(first["loc"][0])) if first["loc"] else None
        place = f"{name}:{node.line}" if node is not None else name
        if first["type"] == "extra_forbidden":
            expected = did_you_mean(key, [*model.model_fields, *inside])
            raise ConfigError(f"{place}: unknown key {shown(key)}", expected=expected) from error
        if first["type"] == "missing":
            raise ConfigError(f"{place}: the key {key!r} is missing") from error
        raise ConfigError(f"{place}: {key[:80]}: {printable(first['msg'])}") from error


def folder_of(description: str, file: Path) -> Path:
    """The folder that `path:` of a description names, relative to the description.

    Raises ConfigError for a variable that is not set, NotFoundError where there is no folder; what
    a variable holds is not said unless it is a folder.
    """
    written = printable(description)
    try:
        root = file.parent / expand(description)
    except ConfigError as error:
        raise ConfigError(
            f"{printable(file.stem)} is read from {error.message}",
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    if not is_folder(root):
        raise NotFoundError(
            f"{printable(file.stem)}: there is no folder {written}",
            expected="the folder that holds the data, relative to the description",
            remedy=f"correct path: in {printable(str(file))}, or put the data there",
        )
    return root


def is_folder(path: Path) -> bool:
    """Whether this is a folder; False for what cannot be a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
