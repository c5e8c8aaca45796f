"""A folder of images that needs no table: its folders are parts, domains and classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import DataError, did_you_mean
from memtool.streams.files import IMAGE_SUFFIXES, files_below, files_key, left_out
from memtool.streams.images import image_bytes
from memtool.streams.listing import Listing, check_word
from memtool.streams.parts import PartName, listed, part_of
from memtool_stores.printable import printable, shown

LAYOUT = "class/image or domain/class/image, perhaps below train/ and test/"

_NAMED = "kind: folder, with train: and test: for the folders that are parts"


@dataclass(frozen=True)
class Layout:
    """What a description says of a folder; empty where its names say it.

    `domains` are the folders that are domains, in their order; `train` and `test` those on top that
    are parts.
    """

    domains: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class FolderSource:
    """A folder class/image or domain/class/image, with train and test on top or without.

    Parts are known by their names, whatever their case. Images are what has the suffix of one.
    """

    def __init__(self, name: str, root: Path, layout: Layout | None = None) -> None:
        """Raises DataError where there are no images, or where it is open what a folder is."""
        self.name = name
        self._root = root
        self._layout = layout or Layout()
        found = files_below(root)
        images = [file for file in found.files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            there = "; ".join(left_out("found", found, []))
            raise DataError(
                f"{self._shown} holds no images" + (f" ({there})" if there else ""),
                expected=f"{LAYOUT}, as PNG, JPEG or the like",
            )
        self._parts = self._named_parts() or self._known_parts(images)
        if self._parts:
            tops = [file.relative_to(root).parts[0] for file in images]
            images = [file for file, top in zip(images, tops, strict=True) if top in self._parts]
        self._images = images
        self._places = [file.relative_to(root).parts for file in images]
        self._has_domains = self._depth() == 3
        self.notes = (self._taken(), *left_out(name, found, images))

    @property
    def key(self) -> str:
        """The names, sizes and times of the images, and what the description says of folders."""
        said = json.dumps([self._layout.domains, sorted(self._parts.items())])
        return f"folder/{said}{files_key(self._root, self._images)}"

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The names of the folders of domains."""
        return self._domains()[1]

    @contextmanager
    def open(self) -> Iterator[Listing]:
        """The rows, sorted by path; classes and domains are sorted by name."""
        labels, class_names = _coded([place[-2] for place in self._places])
        domains, domain_names = self._domains()
        for what, names in (("class", class_names), ("domain", domain_names)):
            for one in names:
                check_word(one, f"a folder of {self._shown}", what)
        yield Listing(
            labels=labels,
            domains=domains,
            is_test=np.array([self._parts.get(place[0]) == "testing" for place in self._places]),
            class_names=class_names,
            domain_names=domain_names,
            encoded=lambda rows: [image_bytes(self._images[row]) for row in rows],
            where=lambda row: str(self._images[row]),
        )

    @property
    def _shown(self) -> str:
        return printable(str(self._root))

    def _domains(self) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
        if not self._has_domains:
            return None, ()
        return _coded([place[-3] for place in self._places], self._layout.domains)

    def _named_parts(self) -> dict[str, PartName]:
        """The parts that the description names. Raises DataError where one is not there."""
        named: dict[str, PartName] = dict.fromkeys(self._layout.train, "training")
        named.update(dict.fromkeys(self._layout.test, "testing"))
        for folder in named:
            if "/" in folder or folder.startswith(".") or not (self._root / folder).is_dir():
                there = sorted(path.name for path in self._root.iterdir() if path.is_dir())
                raise DataError(
                    f"{self.name}: there is no folder {shown(folder)} in {self._shown}",
                    expected=did_you_mean(folder, map(printable, there)),
                    remedy="correct train: and test: in the description",
                )
        return named

    def _known_parts(self, images: Sequence[Path]) -> dict[str, PartName]:
        """The folders on top that are parts by their names; empty where none is.

        A folder that holds images itself is a class. Raises DataError where some are parts and
        some are not, where two are the same part, and for a part that is for validation.
        """
        places = [file.relative_to(self._root).parts for file in images]
        tops = sorted({place[0] for place in places})
        deep = {place[0] for place in places if len(place) > 2}
        if deep and deep <= set(self._layout.domains):
            return {}
        known = {top: part for top in tops if top in deep and (part := part_of(top))}
        if not known:
            return {}
        here = f"{self._shown} has {', '.join(map(printable, tops))} on top"
        remedy = f"rename them, or write a description: {_NAMED}, or domain_names: for domains"
        for top, part in known.items():
            same = [other for other in known if known[other] == part]
            if len(same) > 1:
                raise DataError(
                    f"{here}: {' and '.join(map(printable, same))} are both for {part}",
                    expected="one folder for training and one for testing",
                    remedy=f"put their images into one, or write a description: {_NAMED}",
                )
            if part == "validation":
                raise DataError(
                    f"{here}: {printable(top)} is for validation, which is taken from the training "
                    "images (stream.validation)",
                    expected="one folder for training and one for testing",
                    remedy=f"write a description: {_NAMED} (train: [train, {printable(top)}] to "
                    f"learn from both, test: {printable(top)} to test on it)",
                )
        others = [top for top in tops if top not in known]
        if others or "training" not in known.values():
            what = ", ".join(f"{printable(top)} is for {part}" for top, part in known.items())
            rest = f"{', '.join(map(printable, others))} no part" if others else "none for training"
            raise DataError(
                f"{here}: {what}, and {rest}",
                expected="folders for training and testing alone, or neither of them",
                remedy=remedy,
            )
        return known

    def _depth(self) -> int:
        """How many folders and files a path has below the parts: 2 or 3. DataError for others."""
        above = 1 if self._parts else 0
        depths = Counter(len(place) - above for place in self._places)
        usual = depths.most_common(1)[0][0]
        if len(depths) > 1 or usual not in (2, 3):
            wrong = next(
                file
                for file, place in zip(self._images, self._places, strict=True)
                if len(place) - above not in (2, 3) or len(place) - above != usual
            )
            raise DataError(
                f"{printable(str(wrong))} is not where an image of {self._shown} can be",
                expected=LAYOUT,
                remedy="move it or take it out",
            )
        inner = {place[-2] for place in self._places}
        if usual == 3 and not self._parts and len(inner) > 1 and all(map(part_of, inner)):
            names = ", ".join(printable(one) for one in sorted(inner))
            raise DataError(
                f"{self._shown} has {names} where its classes would be",
                expected=LAYOUT,
                remedy="train and test on top, the classes below them",
            )
        return usual

    def _taken(self) -> str:
        """What the folders were taken for, and how many images each has."""
        words = []
        tops = Counter(place[0] for place in self._places)
        for part in ("training", "testing"):
            folders = [(top, tops[top]) for top, known in self._parts.items() if known == part]
            if folders:
                words.append(f"for {part}: {listed(_printable(folders))}")
        if "testing" not in self._parts.values():
            words.append("no part for testing, so a fifth of every class is held out")
        if self._has_domains:
            domains = Counter(place[-3] for place in self._places)
            order = self._layout.domains or sorted(domains)
            counts = [(one, domains[one]) for one in order if one in domains]
            words.append(f"domains: {listed(_printable(counts))}")
        classes = sorted({place[-2] for place in self._places})
        some = ", ".join(map(printable, classes[:8])) + (", …" if len(classes) > 8 else "")
        words.append(f"{len(classes)} classes: {some}")
        return f"{self.name}: {len(self._images):,} images; {'; '.join(words)}"


def _printable(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(printable(name), count) for name, count in counts]


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
            f"the folder {shown(unknown)} is no domain that the description names",
            expected=did_you_mean(unknown, order),
            remedy="correct domain_names: in the description, or the folder",
        )
    present = [name for name in order if name in found]
    place = np.array([present.index(name) for name in found], dtype=np.int64)
    return place[ids], tuple(present)
