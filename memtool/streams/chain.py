"""Several data sets as one: behind each other, or as the domains of the same classes."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, DataError, did_you_mean
from memtool.streams.description import Description
from memtool.streams.listing import Listing, Source
from memtool.streams.prompts import DEFAULT_TEMPLATE, check_template
from memtool_stores.printable import printable, shown


class ChainSource:
    """Several data sets behind each other, each one domain; classes are the union of all.

    A join has the classes that all of them have, the same ones. In a chain, a class name that two
    data sets have is qualified by the data set in both: `Forest (eurosat)`. Domains inside a data
    set are dropped. `templates` holds one template a data set.
    """

    def __init__(
        self, name: str, description: Description, file: Path, find: Callable[[str], Source]
    ) -> None:
        """`find` gives the data set of a name or path.

        Raises ConfigError for a chain in a chain, a data set named twice or a wrong template.
        """
        here = printable(str(file))
        self.name = name
        self._joins = description.kind == "join"
        self._members: dict[str, Source] = {}
        for source in description.sources:
            beside = file.parent / source
            # A chain would find itself for ever.
            if beside.suffix and beside.is_file() and beside.samefile(file):
                raise self._nested(here, source)
            member = find(str(beside) if beside.suffix and beside.is_file() else source)
            if isinstance(member, ChainSource):
                raise self._nested(here, source)
            if member.name in self._members:
                raise ConfigError(f"{here}: sources names {shown(member.name)} twice")
            self._members[member.name] = member
        for key, template in description.prompts.items():
            if key not in self._members:
                raise ConfigError(
                    f"{here}: prompts names {shown(key)}, which is not among the sources",
                    expected=did_you_mean(key, self._members),
                )
            check_template(template, f"{here}: the prompt of {shown(key)}")
        self.templates = {
            member: description.prompts.get(member, DEFAULT_TEMPLATE) for member in self._members
        }

    @property
    def key(self) -> str:
        """The keys of the members in order; prompts are no part of the data."""
        members = [[name, member.key] for name, member in self._members.items()]
        return json.dumps(["join" if self._joins else "chain", members])

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the members."""
        return tuple(note for member in self._members.values() for note in member.notes)

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
                notes=tuple(note for listing in listings for note in listing.notes),
            )

    @staticmethod
    def _nested(here: str, source: str) -> ConfigError:
        return ConfigError(
            f"{here}: {shown(source)} is a chain itself", expected="data sets, not chains"
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
                f"{name}: {member} and {first} differ in their classes: "
                + ", ".join(map(printable, differing[:5])),
                expected="the same class names in every data set of a join",
                remedy="class_names: in the description of one of them, or kind: chain",
            )
        place = np.array([classes.index(one) for one in listing.class_names], dtype=np.int64)
        labels.append(place[listing.labels])
    return labels, list(classes)
