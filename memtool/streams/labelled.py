"""Data sets with a column of images and a column of labels, as a description says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, DataError, NotFoundError, did_you_mean
from memtool.streams.description import Description
from memtool.streams.files import IMAGE_SUFFIXES, files_below, files_key, left_out
from memtool.streams.images import image_bytes
from memtool.streams.listing import Listing, check_word
from memtool.streams.rows import Rows, Written, read_rows, require_columns
from memtool.streams.table import cache_folder
from memtool_stores.files import part_folder
from memtool_stores.printable import printable, shown

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TEXT = frozenset({"string", "large_string", "string_view"})
_BYTES = frozenset({"binary", "large_binary", "binary_view"})


class DatasetsSource:
    """A data set in a table; `root` is its folder, None on the hub.

    CSV and JSON are read as they are written, the other kinds by Hugging Face `datasets`. Images
    that rows only name lie below `root`.
    """

    def __init__(
        self,
        name: str,
        description: Description,
        root: Path | None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Raises NotFoundError for a file that is not there, ConfigError for one elsewhere."""
        self.name = name
        self._description = description
        self._root = root
        self.notes = notes
        test = _as_tuple(description.test)
        self._parts = [*((part, False) for part in _as_tuple(description.train))]
        self._parts += [(part, True) for part in test]
        if root is None:
            _check_hub_id(name, description.path)
        elif description.kind in ("parquet", "json", "csv"):
            for part, _ in self._parts:
                _check_file(name, description.kind, root, part)

    @property
    def key(self) -> str:
        """The description, and the names, sizes and times of its files.

        A data set on the hub is known by its id and revision: it is read once and then kept.
        """
        meaning = self._description.model_dump(exclude={"about", "licence"})
        if self._root is not None:
            meaning["path"] = ""
        key = json.dumps(meaning, sort_keys=True)
        if self._root is None:
            return key
        if self._description.kind == "parquet":
            return key + files_key(self._root, [self._root / part for part, _ in self._parts])
        # The rows of the other kinds name image files, which may change by themselves.
        return key + files_key(self._root, files_below(self._root).files)

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Those that the description names."""
        return self._description.domain_names or ()

    @contextmanager
    def open(self) -> Iterator[Listing]:
        """The rows in the order of the files or splits. Raises DataError."""
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self._root is None:
                kept = folder / "hub"
            else:
                # What `datasets` prepares is only a step towards the decoded images.
                kept = part_folder(folder / "prepared")
                stack.callback(shutil.rmtree, kept, ignore_errors=True)
            parts = self._read() if self._is_text else self._loaded(kept)
            yield self._listing(parts, kept)

    @property
    def _is_text(self) -> bool:
        return self._description.kind in ("csv", "json")

    @property
    def _columns(self) -> list[str]:
        """The wanted columns but the image."""
        description = self._description
        return [description.label, *([description.domain] if description.domain else [])]

    def _read(self) -> list[Rows]:
        """All parts of a data set in CSV or JSON."""
        assert self._root is not None
        return [
            read_rows(
                self._root / part,
                self._description.kind,
                part,
                image=self._description.image,
                others=self._columns,
                is_test=is_test,
            )
            for part, is_test in self._parts
        ]

    def _loaded(self, kept: Path) -> list[Rows]:
        """All parts that `datasets` reads, their images still encoded."""
        import datasets

        had_bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            return [
                self._rows(self._load(part, kept), part, is_test) for part, is_test in self._parts
            ]
        except (
            datasets.exceptions.DatasetsError,
            OSError,
            ValueError,
            TypeError,
            KeyError,  # no such part
            NotImplementedError,  # how pyarrow tells that a column cannot become images
        ) as error:
            raise self._unreadable(error) from error
        finally:
            if had_bars:
                datasets.enable_progress_bars()

    def _load(self, part: str, kept: Path) -> Dataset:
        import datasets

        # Older releases run the code that a data set comes with, if they are told to.
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
        description = self._description
        match description.kind:
            case "hub":
                return datasets.load_dataset(
                    description.path,
                    description.config,
                    split=part,
                    revision=description.revision,
                    cache_dir=str(kept),
                )
            case "imagefolder":
                return datasets.load_dataset(
                    "imagefolder", data_dir=str(self._root), split=part, cache_dir=str(kept)
                )
            case "saved":
                found = datasets.load_from_disk(str(self._root))
                whole = not isinstance(found, datasets.DatasetDict)
                return found if whole else found[part]
            case kind:
                files = {"train": [str(self._root / part)]} if self._root else {}
                return datasets.load_dataset(
                    kind, data_files=files, split="train", cache_dir=str(kept)
                )

    def _rows(self, rows: Dataset, part: str, is_test: bool) -> Rows:
        import datasets

        image = self._description.image
        require_columns(rows.column_names, [image, *self._columns], self.name)
        what = _no_images(rows.features[image])
        if what is not None:
            raise DataError(
                f"{self.name}: the column {shown(image)} of {printable(part)} holds {what}, not "
                "images",
                expected="images, their bytes, or the names of image files",
                remedy="correct image: in the description",
            )
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return Rows(
            name=part,
            is_test=is_test,
            count=len(rows),
            columns={column: rows[column][:] for column in self._columns},
            class_names={
                column: getattr(rows.features[column], "names", None) or ()
                for column in self._columns
            },
            images=lambda wanted: encoded[list(wanted)][image],
        )

    def _unreadable(self, error: Exception) -> DataError:
        reason = printable(" ".join(str(error).split()))
        if self._root is not None:
            where = printable(str(self._root))
            return DataError(
                f"{self.name} cannot be read from {where}: {reason}",
                expected=f"a data set of kind {self._description.kind}",
                remedy="correct kind:, train: and test: in the description",
            )
        return DataError(
            f"{self.name} cannot be read from the hub ({self._description.path}): {reason}",
            expected="a machine with internet, or a copy that is already in the cache",
            remedy="download it on another machine and describe the copy:"
            " kind: parquet (or imagefolder), path: <its folder>",
        )

    def _listing(self, parts: list[Rows], kept: Path) -> Listing:
        description = self._description
        labels, class_names = self._ids(
            parts, description.label, description.class_names, description.separate_classes
        )
        domains: npt.NDArray[np.int64] | None = None
        domain_names: tuple[str, ...] = ()
        if description.domain:
            domains, domain_names = self._ids(
                parts, description.domain, description.domain_names, False
            )
        starts = np.cumsum([0, *(part.count for part in parts)])
        if starts[-1] == 0:
            raise DataError(f"{self.name} has no rows", expected="one row an image")

        def place(row: int) -> tuple[Rows, int]:
            index = int(np.searchsorted(starts, row, side="right")) - 1
            return parts[index], row - int(starts[index])

        def where(row: int) -> str:
            part, inside = place(row)
            value = part.images([inside])[0]
            path = value["path"] if isinstance(value, dict) else None
            file = f" ({printable(str(path))})" if path else ""
            return f"{self.name}, {part.place(inside)}{file}"

        def encoded(rows: Sequence[int]) -> list[bytes]:
            found: dict[int, bytes] = {}
            for index, part in enumerate(parts):
                mine = [row for row in rows if starts[index] <= row < starts[index + 1]]
                values = part.images([row - int(starts[index]) for row in mine]) if mine else []
                for row, value in zip(mine, values, strict=True):
                    found[row] = self._image_bytes(value, where, row, kept)
            return [found[row] for row in rows]

        return Listing(
            labels=labels,
            domains=domains,
            is_test=np.repeat([part.is_test for part in parts], [part.count for part in parts]),
            class_names=class_names,
            domain_names=domain_names,
            encoded=encoded,
            where=where,
            notes=(*self._held_out(parts), *self._left_out(int(starts[-1]))),
        )

    def _held_out(self, parts: list[Rows]) -> list[str]:
        """That rows of the only part are tested on, where the description names no part for it."""
        if any(part.is_test for part in parts):
            return []
        return [f"{self.name}: no part for testing, so a fifth of every class is held out"]

    def _left_out(self, rows: int) -> list[str]:
        """What of an image folder is in no row: `datasets` goes by suffixes, and by parts."""
        if self._root is None or self._description.kind != "imagefolder":
            return []
        found = files_below(self._root)
        images = [file for file in found.files if file.suffix.lower() in IMAGE_SUFFIXES]
        about = [file for file in found.files if file.stem == "metadata"]
        notes = left_out(self.name, found, [*images, *about])
        if len(images) > rows:
            notes.append(
                f"{self.name}: {len(images) - rows:,} of {len(images):,} images are in no part "
                "that the description names"
            )
        return notes

    def _image_bytes(self, value: Any, where: Callable[[int], str], row: int, kept: Path) -> bytes:
        if value is None or (value["bytes"] is None and not value["path"]):
            raise DataError(f"{where(row)} has no image", remedy="take the row out, or complete it")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        path = Path(value["path"])
        if self._root is not None:
            path = self._root / path
        if not any(_is_below(path, folder) for folder in self._folders(kept)):
            raise DataError(
                f"{where(row)}: its image lies outside of the data set",
                expected="an image below "
                + (printable(self._description.path) if self._root else "the hub's own files"),
                remedy="path: of the description names the folder that holds all images",
            )
        try:
            return image_bytes(path)
        except NotFoundError as error:
            raise DataError(
                f"{where(row)}: there is no such image file",
                remedy="correct the row, or path: in the description",
            ) from error
        except DataError as error:
            raise DataError(
                f"{where(row)}: {error.message}", expected=error.expected, remedy=error.remedy
            ) from error

    def _folders(self, kept: Path) -> list[Path]:
        """Where an image that a row names may lie."""
        if self._root is not None:
            return [self._root, kept]
        import datasets
        import huggingface_hub.constants

        return [
            kept,
            Path(datasets.config.HF_CACHE_HOME),
            Path(huggingface_hub.constants.HF_HUB_CACHE),
        ]

    def _ids(
        self,
        parts: list[Rows],
        column: str,
        given: tuple[str, ...] | None,
        separate: bool,
    ) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Ids of a column's values over all parts (n,), and their names.

        Names come from `given`, else from the data set's own class names, else they are the sorted
        values. With `separate`, those of each part are apart.
        """
        words: list[str] = []
        known: list[str] = []
        for part in parts:
            names = given or part.class_names.get(column) or ()
            prefix = f"{Path(part.name).stem}/" if separate else ""
            words += [prefix + word for word in self._words(part, column, names)]
            known += [prefix + name for name in names]
        order = list(dict.fromkeys(known)) or sorted(set(words), key=_by_number)
        index = {name: number for number, name in enumerate(order)}
        unknown = next((word for word in words if word not in index), None)
        if unknown is not None:
            raise DataError(
                f"{self.name}: {printable(column)} {shown(unknown)} has no name in the description",
                expected=did_you_mean(unknown, map(printable, order)),
                remedy="complete the names in the description",
            )
        return np.array([index[word] for word in words], dtype=np.int64), tuple(order)

    def _words(self, part: Rows, column: str, names: Sequence[str]) -> list[str]:
        """A column as text, as it is written; numbers become names where there are names."""
        words = []
        for row, value in enumerate(part.columns[column]):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                raise self._wrong(part, row, f"no {printable(column)}")
            if isinstance(value, bytes | list | dict):
                raise self._wrong(part, row, f"{printable(column)} is {shown(value)}")
            number = _number(value, names)
            if number is not None and number < 0:  # how `datasets` marks what has no class
                raise self._wrong(part, row, f"no {printable(column)}")
            if number is not None and number >= len(names):
                raise DataError(
                    f"{self.name}, {part.place(row)}: {printable(column)} is {number}, but there "
                    f"are {len(names)} names",
                    remedy="complete the names in the description",
                )
            word = str(value) if number is None else names[number]
            words.append(check_word(word, f"{self.name}, {part.place(row)}", printable(column)))
        return words

    def _wrong(self, part: Rows, row: int, what: str) -> DataError:
        return DataError(
            f"{self.name}, {part.place(row)}: {what}",
            expected="text or a number",
            remedy="complete the row or take it out, or describe parts whose rows all have one",
        )


def _number(value: Any, names: Sequence[str]) -> int | None:
    """The number that stands for one of `names`; None for what is a name itself."""
    if not names or isinstance(value, bool):
        return None
    if isinstance(value, Written) and value not in names and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    return value if isinstance(value, int) else None


def _by_number(word: str) -> tuple[bool, int, str]:
    """Sorts 2 before 10, and numbers before words."""
    is_number = re.fullmatch(r"[0-9]{1,18}", word) is not None
    return (not is_number, int(word) if is_number else 0, word)


def _as_tuple(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


def _no_images(feature: Any) -> str | None:
    """What a column holds that holds no images: numbers, lists of them; None where it may."""
    import datasets

    if isinstance(feature, datasets.Image):
        return None
    if isinstance(feature, dict):
        return None if {"bytes", "path"} & set(feature) else f"records of {', '.join(feature)}"
    dtype = str(getattr(feature, "dtype", "lists"))
    if isinstance(feature, datasets.Value) and dtype in _TEXT | _BYTES:
        return None
    return "nothing" if dtype == "null" else dtype if dtype != "list" else "lists"


def _is_below(path: Path, folder: Path) -> bool:
    """Whether the path leads below the folder as it is written; links there may lead on."""
    inside, above = os.path.abspath(path), os.path.abspath(folder)  # noqa: PTH100 - no links
    return Path(inside).is_relative_to(above)


def _check_file(name: str, kind: str, root: Path, part: str) -> None:
    if not _is_below(root / part, root) or "\0" in part:
        raise ConfigError(
            f"{name}: {shown(part)} is outside of its folder",
            expected="the name of a file below path:",
            remedy="correct path:, train: and test: in the description",
        )
    if not (root / part).is_file():
        names = [printable(file.name) for file in sorted(root.glob(f"*.{kind}*"))]
        raise NotFoundError(
            f"{name}: there is no file {printable(str(root / part))}",
            expected=did_you_mean(part, names) if names else f"a {kind} file",
            remedy="correct train: and test: in the description",
        )


def _check_hub_id(name: str, id: str) -> None:
    if not _HUB_ID.fullmatch(id):
        raise ConfigError(
            f"{name}: {shown(id)} cannot be the id of a data set on the hub",
            expected="owner/name, as uoft-cs/cifar10",
            remedy="correct path: in the description, or another kind:",
        )
    if Path(id).exists():
        raise ConfigError(
            f"{name}: {id} is a folder here, which would be read in place of the hub",
            remedy="the same command in another folder, or kind: parquet (or imagefolder) for it",
        )
