"""Data sets: YAML descriptions read through Hugging Face `datasets`, and plain image folders.

A description says where a data set is and what its columns mean:

    kind: parquet                    # or json, csv, imagefolder, hub, folder
    path: ${MEMTOOL_DATA}/pacs       # a folder, or the id of a data set on the hub
    train: train.parquet             # a file of that folder, or the name of a split
    test: test.parquet               # without one, a fifth of every class is held out
    image: image                     # the columns
    label: label
    domain: domain
    class_names: [dog, elephant]     # only where the data itself does not carry them

A folder `class/image` or `domain/class/image`, with `train` and `test` on top or without, needs no
description. A chain puts data sets behind each other, for a stream with one task a data set:

    kind: chain
    sources: [caltech101, mnist]     # other descriptions by name, in this order
    prompts: {mnist: "a photo of the number: {}."}   # for a text tower; others have a default

A join (`kind: join`, the same keys) is for data sets of the same classes: each becomes a domain.
"""

from __future__ import annotations

from pathlib import Path

from memtool.errors import DataError, NotFoundError, did_you_mean
from memtool.paths import expand
from memtool.settings import BY_DOMAIN, StreamSettings
from memtool.streams.chain import ChainSource
from memtool.streams.description import Description, folder_of, is_folder, read_description
from memtool.streams.folder import FolderSource, Layout
from memtool.streams.guess import guess
from memtool.streams.labelled import DatasetsSource
from memtool.streams.listing import Source
from memtool.words import either, near
from memtool_stores.printable import printable, shown

PATHS = (
    "a folder of images, a table (.csv, .json, .jsonl, .parquet), what `save_to_disk` wrote, or a "
    "YAML description"
)


def built_in_descriptions() -> dict[str, Path]:
    """The descriptions that ship with memtool, by name."""
    folder = Path(__file__).parent / "descriptions"
    return {file.stem: file for file in folder.glob("*.yaml")}


def find_source(source: str) -> Source:
    """The data set of a built-in name, a YAML description's path, a folder, or a table.

    Raises NotFoundError where there is nothing of that name or path, ConfigError for a description
    that cannot be used, DataError for a file that is none of these.
    """
    built_in = built_in_descriptions()
    if source in built_in:
        return _described(built_in[source])
    path = expand(source)
    if path.suffix in (".yaml", ".yml"):
        return _described(path)
    if (guessed := guess(path) if _is_there(path) else None) is not None:
        description, root, notes = guessed
        return DatasetsSource(printable(path.resolve().stem), description, root, notes)
    if is_folder(path):
        return FolderSource(printable(path.resolve().name), path)
    require_path(source, path)
    raise NotFoundError(
        f"there is no data source {shown(source)}",
        expected=did_you_mean(source, ["digits", *sorted(built_in)]),
        remedy="a name of these, or the path of " + PATHS,
    )


def require_path(source: str, path: Path, reads: str = PATHS) -> None:
    """Raise an error for a source that is written as a path, and for a file of another kind.

    NotFoundError where nothing is there, DataError for a file that is none of `reads`.
    """
    if _is_there(path):
        raise DataError(f"{printable(str(path))} is none of what is read", expected=reads)
    if "/" in source or source.startswith(("~", ".")) or path.suffix:
        parent = next((one for one in path.parents if _is_there(one)), path.parent)
        there = sorted(one.name for one in parent.iterdir()) if parent.is_dir() else []
        gone = path.relative_to(parent).parts[0]
        close = near(gone, [printable(one) for one in there])
        raise NotFoundError(
            f"there is no file or folder {printable(str(path))}",
            expected=f"did you mean {either([str(parent / one) for one in close])}?"
            if close
            else reads,
            remedy=f"{printable(str(parent.absolute()))} is there, {shown(gone)} in it is not",
        )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def task_names(settings: StreamSettings) -> list[str]:
    """The names of the tasks that are domains, as far as they are known without reading images.

    Empty for a stream of class groups and for a description that does not name its domains.
    Errors as `find_source`.
    """
    of_domains = settings.setting in BY_DOMAIN
    if not of_domains and (settings.setting != "mtl" or settings.splits is not None):
        return []
    if settings.order:
        return list(settings.order)
    if settings.source == "digits":
        from memtool.streams.digits import digits_domains

        return list(digits_domains(settings.setting))
    source = find_source(settings.source)
    return list(source.domain_names)


def templates(source: str) -> dict[str, str]:
    """The templates of prompts that a source's description gives, by data set; none for others.

    Errors as `find_source`.
    """
    found = find_source(source)
    return found.templates if isinstance(found, ChainSource) else {}


def _described(file: Path) -> Source:
    description = read_description(file)
    name = printable(file.stem)
    if description.kind in ("chain", "join"):
        return ChainSource(name, description, file, find_source)
    if description.kind == "hub":
        return DatasetsSource(name, description, None)
    root = folder_of(description.path, file)
    if description.kind == "folder":
        return FolderSource(name, root, _layout(description))
    return DatasetsSource(name, description, root)


def _layout(description: Description) -> Layout:
    """What a description says of a folder; its parts only where it names them."""
    said = description.model_fields_set
    parts = {
        key: (value,) if isinstance(value, str) else value
        for key, value in (("train", description.train), ("test", description.test))
        if key in said or (key == "train" and "test" in said)
    }
    return Layout(domains=description.domain_names or (), **parts)
