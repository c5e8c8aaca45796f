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

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from memtool.config import StreamSettings
from memtool.errors import ConfigError, DataError, NotFoundError, did_you_mean
from memtool.streams.prompts import DEFAULT_TEMPLATE, check_template
from memtool.streams.table import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_FOLDER_LAYOUT = "class/image or domain/class/image, perhaps below train/ and test/"


@dataclass(frozen=True, eq=False)
class Listing:
    """The rows of a source before any image is decoded.

    labels and domains int64 (n,), is_test bool (n,); `encoded` gives the bytes of some rows'
    images, `where` says in words where a row is.
    """

    labels: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64] | None
    is_test: npt.NDArray[np.bool_]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    encoded: Callable[[Sequence[int]], list[bytes]]
    where: Callable[[int], str]


class Source(Protocol):
    """A data set that can be listed."""

    @property
    def name(self) -> str:
        """What it is called in messages and in the cache."""

    @property
    def key(self) -> str:
        """Changes whenever the data may have changed; found without reading any image."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains, as far as they are known without opening it."""

    def open(self) -> AbstractContextManager[Listing]:
        """The rows; readable until the context ends. Raises DataError."""


class Description(BaseModel):
    """One data set in YAML; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    licence: str = ""
    kind: Literal["parquet", "json", "csv", "imagefolder", "hub", "folder", "chain", "join"]
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


def built_in_descriptions() -> dict[str, Path]:
    """The descriptions that ship with memtool, by name."""
    folder = Path(__file__).parent / "descriptions"
    return {file.stem: file for file in folder.glob("*.yaml")}


def find_source(source: str) -> Source:
    """The data set of a built-in name, a YAML description's path, or a folder.

    Raises NotFoundError where there is nothing of that name, ConfigError for a description that
    cannot be used.
    """
    built_in = built_in_descriptions()
    if source in built_in:
        return _described(built_in[source])
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise NotFoundError(f"there is no description {path}", remedy="check the path")
        return _described(path)
    if path.is_dir():
        return FolderSource(path.resolve().name, path)
    raise NotFoundError(
        f"there is no data source {source!r}",
        expected=did_you_mean(source, ["digits", *sorted(built_in)]),
        remedy="a name of these, the path of a YAML description, or a folder of images",
    )


def task_names(settings: StreamSettings) -> list[str]:
    """The names of the tasks that are domains, as far as they are known without reading images.

    Empty for a stream of class groups and for a description that does not name its domains.
    Errors as `find_source`.
    """
    if settings.setting not in ("dil", "dg", "xtail"):
        return []
    if settings.order:
        return list(settings.order)
    if settings.source == "digits":
        from memtool.streams.digits import digits_domains

        return list(digits_domains(settings.setting))
    source = find_source(settings.source)
    return list(source.domain_names)


def read_description(file: Path) -> Description:
    """Parse and validate one YAML description; ConfigError names the file and the key."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a description", expected="keys such as kind and path")
    try:
        description = Description.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            expected = did_you_mean(key, Description.model_fields)
            raise ConfigError(f"{file}: unknown key {key!r}", expected=expected) from error
        if first["type"] == "missing":
            raise ConfigError(f"{file}: the key {key!r} is missing") from error
        raise ConfigError(f"{file}: {key}: {first['msg']}") from error
    several = description.kind in ("chain", "join")
    needed, other = ("sources", "path") if several else ("path", "sources")
    if not getattr(description, needed):
        raise ConfigError(f"{file}: the key {needed!r} is missing")
    if getattr(description, other):
        raise ConfigError(f"{file}: kind {description.kind} has no {other}")
    return description


def templates(source: str) -> dict[str, str]:
    """The templates of prompts that a source's description gives, by data set; none for others.

    Errors as `find_source`.
    """
    found = find_source(source)
    return found.templates if isinstance(found, ChainSource) else {}


def _described(file: Path) -> Source:
    description = read_description(file)
    if description.kind in ("chain", "join"):
        return ChainSource(file.stem, description, file)
    if description.kind == "hub":
        return DatasetsSource(file.stem, description, None)
    root = file.parent / Path(_expanded(description.path, file)).expanduser()
    if not root.is_dir():
        raise NotFoundError(
            f"{file.stem}: there is no folder {root}",
            expected=f"the folder that path: {description.path} names",
            remedy=f"correct path: in {file}, or put the data there",
        )
    if description.kind == "folder":
        return FolderSource(file.stem, root, description.domain_names or ())
    return DatasetsSource(file.stem, description, root)


def _expanded(path: str, file: Path) -> str:
    """`path` with every ${NAME} replaced by that environment variable."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise ConfigError(
                f"{file.stem} is read from {path}, but {name} is not set",
                remedy=f"export {name}=<the folder that holds the data>",
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, path)


def _files_key(root: Path, files: Sequence[Path]) -> str:
    """A sha256 over the names, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(
            f"{file.relative_to(root).as_posix()}/{state.st_size}/{state.st_mtime_ns}\n".encode()
        )
    return digest.hexdigest()


def _all_files(root: Path) -> list[Path]:
    """Every file below `root` that is not hidden, sorted."""
    return sorted(
        path
        for path in root.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    )


def _file_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


class FolderSource:
    """A folder class/image or domain/class/image, with train and test on top or without."""

    def __init__(self, name: str, root: Path, domains: Sequence[str] = ()) -> None:
        """`domains` gives their order; without it they are sorted by name."""
        self.name = name
        self._root = root
        self._domains = tuple(domains)
        everything = _all_files(root)
        self._images = [file for file in everything if file.suffix.lower() in _IMAGE_SUFFIXES]
        if not self._images:
            raise DataError(
                f"{root} holds no images", expected=f"{_FOLDER_LAYOUT}, as PNG, JPEG or the like"
            )

    @property
    def key(self) -> str:
        """The names, sizes and times of the images, and the order of the domains."""
        order = json.dumps(self._domains) if self._domains else ""
        return f"folder/{order}{_files_key(self._root, self._images)}"

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The names of the folders of domains."""
        with self.open() as listing:
            return listing.domain_names

    @contextmanager
    def open(self) -> Iterator[Listing]:
        """The rows, sorted by path; classes and domains are sorted by name."""
        parts = [file.relative_to(self._root).parts for file in self._images]
        tops = {part[0] for part in parts}
        has_splits = tops <= {"train", "test"} and "train" in tops
        if not has_splits and tops & {"train", "test"}:
            raise DataError(
                f"{self._root} has {', '.join(sorted(tops))} on top",
                expected="train and test alone, or neither of them",
                remedy="write a description with kind: imagefolder that names the splits",
            )
        depth = 1 if has_splits else 0
        levels = {len(part) - depth for part in parts}
        if levels not in ({2}, {3}):
            wrong = next(
                file
                for file, part in zip(self._images, parts, strict=True)
                if len(part) - depth not in (2, 3) or len(part) != len(parts[0])
            )
            raise DataError(
                f"{wrong} is not where an image of {self._root} can be", expected=_FOLDER_LAYOUT
            )
        labels, class_names = _coded([part[-2] for part in parts])
        domains: npt.NDArray[np.int64] | None = None
        domain_names: tuple[str, ...] = ()
        if levels == {3}:
            domains, domain_names = _coded([part[-3] for part in parts], self._domains)
        yield Listing(
            labels=labels,
            domains=domains,
            is_test=np.array([has_splits and part[0] == "test" for part in parts]),
            class_names=class_names,
            domain_names=domain_names,
            encoded=lambda rows: [_file_bytes(self._images[row]) for row in rows],
            where=lambda row: str(self._images[row]),
        )


def _coded(
    words: Sequence[str], order: Sequence[str] = ()
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Ids of words (n,), and the words themselves, sorted or in the given order."""
    names, ids = np.unique(np.asarray(words, dtype=np.str_), return_inverse=True)
    found = [str(name) for name in names]
    if not order:
        return ids.astype(np.int64), tuple(found)
    unknown = next((name for name in found if name not in order), None)
    if unknown is not None:
        raise DataError(
            f"the folder {unknown!r} is no domain that the description names",
            expected=did_you_mean(unknown, order),
            remedy="correct domain_names: in the description, or the folder",
        )
    present = [name for name in order if name in found]
    place = np.array([present.index(name) for name in found], dtype=np.int64)
    return place[ids], tuple(present)


@dataclass(frozen=True, eq=False)
class _Part:
    """One file or split of a described data set."""

    name: str
    rows: Dataset
    is_test: bool


class DatasetsSource:
    """A data set that Hugging Face `datasets` reads; `root` is its folder, None on the hub."""

    def __init__(self, name: str, description: Description, root: Path | None) -> None:
        self.name = name
        self._description = description
        self._root = root
        test = _as_tuple(description.test)
        self._parts = [*((part, False) for part in _as_tuple(description.train))]
        self._parts += [(part, True) for part in test]
        by_file = description.kind in ("parquet", "json", "csv")
        for part, _ in self._parts:
            if by_file and root is not None and not (root / part).is_file():
                names = [file.name for file in sorted(root.glob(f"*.{description.kind}*"))]
                raise NotFoundError(
                    f"{name}: there is no file {root / part}",
                    expected=did_you_mean(part, names) if names else f"a {description.kind} file",
                    remedy="correct train: and test: in the description",
                )

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
            return key + _files_key(self._root, [self._root / part for part, _ in self._parts])
        # The rows of the other kinds name image files, which may change by themselves.
        return key + _files_key(self._root, _all_files(self._root))

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
                temporary = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
                kept = Path(stack.enter_context(temporary))
            yield self._listing(self._loaded(kept))

    def _loaded(self, kept: Path) -> list[_Part]:
        """All parts, their images still encoded."""
        import datasets

        had_bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            loaded = [
                _Part(part, self._encoded_images(self._load(part, kept)), is_test)
                for part, is_test in self._parts
            ]
        except (
            datasets.exceptions.DatasetsError,
            OSError,
            ValueError,
            TypeError,
            NotImplementedError,  # how pyarrow tells that a column cannot become images
        ) as error:
            raise self._unreadable(error) from error
        finally:
            if had_bars:
                datasets.enable_progress_bars()
        return loaded

    def _load(self, part: str, kept: Path) -> Dataset:
        import datasets

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
            case kind:
                files = {"train": [str(self._root / part)]} if self._root else {}
                return datasets.load_dataset(
                    kind, data_files=files, split="train", cache_dir=str(kept)
                )

    def _encoded_images(self, rows: Dataset) -> Dataset:
        import datasets

        description = self._description
        wanted = [description.image, description.label]
        wanted += [description.domain] if description.domain else []
        for column in wanted:
            if column not in rows.column_names:
                raise DataError(
                    f"{self.name} has no column {column!r}",
                    expected=did_you_mean(column, rows.column_names),
                    remedy="correct image:, label: or domain: in the description",
                )
        return rows.select_columns(wanted).cast_column(
            description.image, datasets.Image(decode=False)
        )

    def _unreadable(self, error: Exception) -> DataError:
        if self._root is not None:
            return DataError(f"{self.name} cannot be read from {self._root}: {error}")
        return DataError(
            f"{self.name} cannot be read from the hub ({self._description.path}): {error}",
            expected="a machine with internet, or a copy that is already in the cache",
            remedy="download it on another machine and describe the copy:"
            " kind: parquet (or imagefolder), path: <its folder>",
        )

    def _listing(self, parts: list[_Part]) -> Listing:
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
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        if starts[-1] == 0:
            raise DataError(f"{self.name} has no rows")

        def place(row: int) -> tuple[_Part, int]:
            index = int(np.searchsorted(starts, row, side="right")) - 1
            return parts[index], row - int(starts[index])

        def where(row: int) -> str:
            part, inside = place(row)
            path = part.rows[inside][description.image]["path"]
            file = f" ({path})" if path else ""
            return f"{self.name}, row {inside} of {part.name}{file}"

        def encoded(rows: Sequence[int]) -> list[bytes]:
            found: dict[int, bytes] = {}
            for index, part in enumerate(parts):
                mine = [row for row in rows if starts[index] <= row < starts[index + 1]]
                values = part.rows[[row - int(starts[index]) for row in mine]]
                for row, value in zip(mine, values[description.image], strict=True):
                    found[row] = self._image_bytes(value, where, row)
            return [found[row] for row in rows]

        return Listing(
            labels=labels,
            domains=domains,
            is_test=np.repeat([part.is_test for part in parts], [len(part.rows) for part in parts]),
            class_names=class_names,
            domain_names=domain_names,
            encoded=encoded,
            where=where,
        )

    def _image_bytes(
        self, value: dict[str, Any] | None, where: Callable[[int], str], row: int
    ) -> bytes:
        if value is None:
            raise DataError(f"{self.name}: row {row} has no image")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        path = Path(value["path"])
        if self._root is not None:
            path = self._root / path
        if not path.is_file():
            raise DataError(f"{where(row)}: there is no such image file")
        return _file_bytes(path)

    def _ids(
        self,
        parts: list[_Part],
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
            names = given or getattr(part.rows.features[column], "names", None) or ()
            prefix = f"{Path(part.name).stem}/" if separate else ""
            words += [prefix + word for word in self._words(part, column, names)]
            known += [prefix + name for name in names]
        order = list(dict.fromkeys(known)) or sorted(set(words), key=_by_number)
        index = {name: number for number, name in enumerate(order)}
        unknown = next((word for word in words if word not in index), None)
        if unknown is not None:
            raise DataError(
                f"{self.name}: {column} {unknown!r} has no name in the description",
                expected=did_you_mean(unknown, order),
            )
        return np.array([index[word] for word in words], dtype=np.int64), tuple(order)

    def _words(self, part: _Part, column: str, names: Sequence[str]) -> list[str]:
        """A column as text: numbers become names where there are names."""
        words = []
        for row, value in enumerate(part.rows[column][:]):
            where = f"{self.name}, row {row} of {part.name}"
            if value is None or (isinstance(value, int) and names and value < 0):
                raise DataError(
                    f"{where}: no {column}", remedy="describe splits whose rows all have one"
                )
            if isinstance(value, int) and names:
                if value >= len(names):
                    raise DataError(
                        f"{where}: {column} is {value}, but there are {len(names)} names",
                        remedy="complete the names in the description",
                    )
                value = names[value]
            words.append(str(value))
        return words


def _by_number(word: str) -> tuple[bool, int, str]:
    """Sorts 2 before 10, and numbers before words."""
    return (not word.isdecimal(), int(word) if word.isdecimal() else 0, word)


def _as_tuple(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


class ChainSource:
    """Several data sets behind each other, each one domain; classes are the union of all.

    A join has the classes that all of them have, the same ones. In a chain, a class name that two
    data sets have is qualified by the data set in both: `Forest (eurosat)`. Domains inside a data
    set are dropped. `templates` holds one template a data set.
    """

    def __init__(self, name: str, description: Description, file: Path) -> None:
        """Raises ConfigError for a chain in a chain, a data set named twice or a wrong template."""
        self.name = name
        self._joins = description.kind == "join"
        self._members: dict[str, Source] = {}
        for source in description.sources:
            beside = file.parent / source
            member = find_source(str(beside) if beside.suffix and beside.is_file() else source)
            if isinstance(member, ChainSource):
                raise ConfigError(
                    f"{file}: {source!r} is a chain itself", expected="data sets, not chains"
                )
            if member.name in self._members:
                raise ConfigError(f"{file}: sources names {member.name!r} twice")
            self._members[member.name] = member
        for key, template in description.prompts.items():
            if key not in self._members:
                raise ConfigError(
                    f"{file}: prompts names {key!r}, which is not among the sources",
                    expected=did_you_mean(key, self._members),
                )
            check_template(template, f"{file}: the prompt of {key!r}")
        self.templates = {
            member: description.prompts.get(member, DEFAULT_TEMPLATE) for member in self._members
        }

    @property
    def key(self) -> str:
        """The keys of the members in order; prompts are no part of the data."""
        members = [[name, member.key] for name, member in self._members.items()]
        return json.dumps(["join" if self._joins else "chain", members])

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The names of the data sets, in the order of the chain."""
        return tuple(self._members)

    @contextmanager
    def open(self) -> Iterator[Listing]:
        """The rows of one data set after another. Raises DataError."""
        with contextlib.ExitStack() as stack:
            listings = [stack.enter_context(member.open()) for member in self._members.values()]
            known = Counter(name for one in listings for name in one.class_names)
            class_names: list[str] = []
            labels: list[npt.NDArray[np.int64]] = []
            for domain, listing in zip(self._members, listings, strict=True):
                labels.append(listing.labels + len(class_names))
                class_names += [
                    f"{name} ({domain})" if known[name] > 1 else name
                    for name in listing.class_names
                ]
            if self._joins:
                labels, class_names = _same_classes(
                    self.name, dict(zip(self._members, listings, strict=True))
                )
            sizes = [len(listing.labels) for listing in listings]
            starts = np.cumsum([0, *sizes])

            def encoded(rows: Sequence[int]) -> list[bytes]:
                found: dict[int, bytes] = {}
                for start, end, listing in zip(starts, starts[1:], listings, strict=False):
                    mine = [row for row in rows if start <= row < end]
                    if mine:
                        inside = listing.encoded([row - int(start) for row in mine])
                        found.update(zip(mine, inside, strict=True))
                return [found[row] for row in rows]

            def where(row: int) -> str:
                index = int(np.searchsorted(starts, row, side="right")) - 1
                return listings[index].where(row - int(starts[index]))

            yield Listing(
                labels=np.concatenate(labels),
                domains=np.repeat(np.arange(len(listings)), sizes),
                is_test=np.concatenate([listing.is_test for listing in listings]),
                class_names=tuple(class_names),
                domain_names=tuple(self._members),
                encoded=encoded,
                where=where,
            )


def _same_classes(
    name: str, listings: dict[str, Listing]
) -> tuple[list[npt.NDArray[np.int64]], list[str]]:
    """The labels of every listing as ids into the classes of the first, and those classes.

    Raises DataError where a data set has other classes.
    """
    first, *_ = listings
    classes = listings[first].class_names
    labels = []
    for member, listing in listings.items():
        differing = sorted(set(classes) ^ set(listing.class_names))
        if differing:
            raise DataError(
                f"{name}: {member} and {first} differ in their classes: {', '.join(differing[:5])}",
                expected="the same class names in every data set of a join",
                remedy="class_names: in the description of one of them, or kind: chain",
            )
        place = np.array([classes.index(one) for one in listing.class_names], dtype=np.int64)
        labels.append(place[listing.labels])
    return labels, list(classes)
