"""What a path holds where nobody described it: a table, or what Hugging Face `datasets` saved.

A description follows from its columns, and what was taken for what is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from memtool.errors import DataError, NotFoundError
from memtool.streams.description import Description
from memtool.streams.parts import part_of
from memtool.streams.rows import csv_rows, json_rows, text_of
from memtool_stores.printable import printable

Kind = Literal["csv", "json", "parquet", "saved"]

KINDS: dict[str, Kind] = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
"""The kinds of tables by the suffix of their files."""

IMAGE = (
    *("image", "img", "picture", "photo", "pixel_values", "file_name", "filename", "file"),
    *("image_path", "image_file", "path", "filepath", "file_path"),
)
LABEL = ("label", "labels", "class", "class_name", "target", "category", "fine_label", "y")
DOMAIN = ("domain", "domain_name", "style", "source")
"""Names that columns go by, the likelier first."""

_SAVED, _SEVERAL = "dataset_info.json", "dataset_dict.json"


def guess(path: Path) -> tuple[Description, Path, tuple[str, ...]] | None:
    """The description of what lies at a path, its folder, and sentences on what was taken for what.

    None where it is neither a table nor a saved data set. Raises DataError for one whose columns
    do not say what they are.
    """
    if path.is_dir():
        if (path / _SEVERAL).is_file() or (
            (path / _SAVED).is_file() and (path / "state.json").is_file()
        ):
            return _of_saved(path)
        return None
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        return None
    train, test = _parts(path)
    columns = _columns(path, kind)
    return _described(path.parent, printable(path.name), kind, columns, train, test)


def _parts(path: Path) -> tuple[str, tuple[str, ...]]:
    """The file to learn from, and the one to test on: beside a train.csv its test.csv."""
    if part_of(path.stem) != "training":
        return path.name, ()
    others = [
        one.name
        for one in sorted(path.parent.iterdir())
        if one.suffix == path.suffix and part_of(one.stem) == "testing"
    ]
    return path.name, tuple(others[:1])


def _columns(path: Path, kind: Kind) -> Sequence[str]:
    name = printable(str(path))
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return list(parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{name}: cannot be read as Parquet ({printable(str(error))})",
                expected="a whole file of that format",
            ) from error
    return (csv_rows if kind == "csv" else json_rows)(text_of(path), name)[0]


def _of_saved(path: Path) -> tuple[Description, Path, tuple[str, ...]]:
    """What `save_to_disk` wrote: one data set, or several parts of one."""
    name = printable(path.resolve().name)
    try:
        if not (path / _SEVERAL).is_file():
            names = list(json.loads(text_of(path / _SAVED))["features"])
            return _described(path, name, "saved", names, "", ())
        splits = list(json.loads(text_of(path / _SEVERAL))["splits"])
        named = {one: part_of(one) for one in splits}
        train = next((one for one, part in named.items() if part == "training"), splits[0])
        test = tuple(one for one, part in named.items() if part == "testing")[:1]
        names = list(json.loads(text_of(path / train / _SAVED))["features"])
    except (ValueError, KeyError, IndexError, TypeError, FileNotFoundError, NotFoundError) as error:
        raise DataError(
            f"{printable(str(path))} is no whole data set of `save_to_disk`",
            expected=f"{_SEVERAL} with splits, and {_SAVED} with features in each",
        ) from error
    return _described(path, name, "saved", names, train, test)


def _described(
    root: Path,
    name: str,
    kind: Kind,
    columns: Sequence[str],
    train: str,
    test: tuple[str, ...],
) -> tuple[Description, Path, tuple[str, ...]]:
    image = _one_of(columns, IMAGE, name, "images")
    label = _one_of([one for one in columns if one != image], LABEL, name, "labels")
    lower = {one.casefold(): one for one in columns if one not in (image, label)}
    domain = next((lower[one] for one in DOMAIN if one in lower), None)
    description = Description(
        kind=kind, path=str(root), train=train, test=test, image=image, label=label, domain=domain
    )
    used = [image, label, *([domain] if domain else [])]
    rest = [printable(one) for one in columns if one not in used]
    said = f"{name}: taken for {_FORMS[kind]}; images in column {printable(image)}, labels in "
    said += printable(label) + (f", domains in {printable(domain)}" if domain else "")
    said += f"; not used: {', '.join(rest)}" if rest else ""
    if test:
        said += f"; tested on {printable(test[0])}"
    return description, root, (said,)


_FORMS = {
    "csv": "CSV",
    "json": "JSON",
    "parquet": "Parquet",
    "saved": "a data set of save_to_disk",
}


def _one_of(columns: Sequence[str], names: Sequence[str], name: str, what: str) -> str:
    lower = {one.casefold(): one for one in reversed(columns)}
    for one in names:
        if one in lower:
            return lower[one]
    there = ", ".join(printable(one)[:80] for one in columns[:50]) or "no columns"
    raise DataError(
        f"{name}: none of its columns is known to hold {what} ({there})",
        expected=f"one called {', '.join(names[:6])} or the like",
        remedy=f"a description in YAML that says {what.removesuffix('s')}: COLUMN",
    )
