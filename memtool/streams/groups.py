"""Which classes and which domains make a task, in which order.

dil, dg, dgcl, xtail   all classes of a domain
cil, til, mts          some classes of all domains
vil                    some classes of a domain; every pair once, in random order
mtl                    a domain, or where there are none (or `splits` is set) some classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, DataError
from memtool.settings import BY_DOMAIN, StreamSettings
from memtool.streams.ordering import named_places, random_ranks
from memtool.streams.table import Table

_TESTED_IN_COMMON = ("dil", "vil", "mtl")
_AGAIN = (
    "--set stream.setting=vil --set stream.order=none, where labels come again with another domain"
)


@dataclass(frozen=True)
class Group:
    """What a task takes of a table: `classes` (none: all) of a `domain` (none: of all)."""

    name: str
    classes: tuple[int, ...] | None = None
    domain: int | None = None

    def rows(self, table: Table) -> npt.NDArray[np.bool_]:
        """Mask (n,) of its rows."""
        inside = np.ones(len(table), dtype=np.bool_)
        if self.domain is not None:
            inside &= table.domains == self.domain
        return inside & self.of_classes(table)

    def of_classes(self, table: Table) -> npt.NDArray[np.bool_]:
        """Mask (n,) of the rows of its classes, whatever their domain."""
        if self.classes is None:
            return np.ones(len(table), dtype=np.bool_)
        return np.isin(table.labels, self.classes)

    @property
    def identity(self) -> list[Any]:
        """Its part of the fingerprint of a stream: JSON."""
        domain = [] if self.domain is None else [self.domain]
        if self.classes is None:
            return [self.name, domain]
        return [self.name, [*self.classes], *domain]


def groups_of(table: Table, settings: StreamSettings) -> list[Group]:
    """What every task takes, in order. Errors as `memtool.streams.cuts.cut`."""
    match settings.setting:
        case "vil":
            return _pairs(table, settings)
        case "mtl":
            with_domains = table.domains is not None and settings.splits is None
            return _domains(table, settings) if with_domains else _classes(table, settings)
        case setting if setting in BY_DOMAIN:
            return _domains(table, settings)
        case _:
            return _classes(table, settings)


def rows_in_common(table: Table, setting: str) -> npt.NDArray[np.bool_]:
    """Mask (n,) of the rows of the domains of `common_tests`."""
    if table.domains is None:
        return np.zeros(len(table), dtype=np.bool_)
    return np.isin(table.domains, common_tests(table, setting))


def common_tests(table: Table, setting: str) -> tuple[int, ...]:
    """The domains of which all images are for testing, where others have none for it; else none.

    As in CORe50, whose sessions 3, 7 and 10 test what is learned of all others.
    """
    if table.domains is None or setting not in _TESTED_IN_COMMON:
        return ()
    for_test = np.unique(table.domains[table.is_test])
    for_training = np.unique(table.domains[~table.is_test])
    if not len(np.setdiff1d(for_training, for_test)):
        return ()
    return tuple(np.setdiff1d(for_test, for_training).tolist())


def _domains(table: Table, settings: StreamSettings) -> list[Group]:
    """A group a domain, in the order of the table or as `stream.order` names them."""
    names = settings.order or [table.domain_names[one] for one in _learned(table, settings)]
    ids = named_places(names, table.domain_names, table.name, "domain")
    return [Group(name, domain=one) for name, one in zip(names, ids, strict=True)]


def _learned(table: Table, settings: StreamSettings) -> list[int]:
    """The domains that can be learned from."""
    if table.domains is None:
        other = "cil or til" if settings.setting != "vil" else "cil, whose labels come once"
        raise DataError(
            f"{table.name} has no domains, so it cannot be cut as {settings.setting}",
            expected="a source with a domain column, or a folder domain/class/image",
            remedy=f"stream.setting {other}",
        )
    common = common_tests(table, settings.setting)
    return [one for one in range(len(table.domain_names)) if one not in common]


def _classes(table: Table, settings: StreamSettings) -> list[Group]:
    """A group of classes a task, in the order that the seed draws or `stream.order` names."""
    if settings.order:
        order = named_places(settings.order, table.class_names, table.name, "class", again=_AGAIN)
    else:
        order = _class_order(table, settings)
    parts = _parted(table, settings, order)
    return [Group(_named(table, part), part) for part in parts]


def _pairs(table: Table, settings: StreamSettings) -> list[Group]:
    """Every group of classes in every domain, in the order that the seed draws or as named.

    A pair is called group@domain; where there is one group it is called as the domain, where there
    is one domain as the group.
    """
    domains = _learned(table, settings)
    parts = _parted(table, settings, _class_order(table, settings))
    if len(parts) == 1:
        parts = [tuple(sorted(parts[0]))]
    pairs = []
    for domain in domains:
        for part in parts:
            group, where = _named(table, part), table.domain_names[domain]
            one = where if len(parts) == 1 else group
            name = one if 1 in (len(parts), len(domains)) else f"{group}@{where}"
            pairs.append(Group(name, part, domain))
    if settings.order is None:
        ranks = random_ranks(len(pairs), "vil order", settings.seed)
        return [pairs[place] for place in np.argsort(ranks).tolist()]
    names = [pair.name for pair in pairs]
    places = named_places(settings.order, names, table.name, "task")
    return [pairs[place] for place in places]


def _class_order(table: Table, settings: StreamSettings) -> list[int]:
    count = len(table.class_names)
    if settings.class_order == "given":
        return list(range(count))
    order: list[int] = np.argsort(random_ranks(count, "class order", settings.seed)).tolist()
    return order


def _parted(table: Table, settings: StreamSettings, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The classes of `order`, `splits` groups of them or so many in each."""
    if settings.splits is not None:
        if 2 * settings.splits > len(order):
            raise ConfigError(
                f"stream.splits is {settings.splits}, but there are {len(order)} classes"
                f" of {table.name}",
                expected=f"a number from 1 to {len(order) // 2}: a task has two classes or more",
            )
        return [tuple(part.tolist()) for part in np.array_split(np.array(order), settings.splits)]
    width = settings.classes_per_task
    if width > len(order):
        raise ConfigError(
            f"stream.classes_per_task is {width}, but there are {len(order)} classes"
            f" of {table.name}",
            expected=f"a number from 2 to {len(order)}",
        )
    return [tuple(order[start : start + width]) for start in range(0, len(order), width)]


def _named(table: Table, classes: Sequence[int]) -> str:
    names = [table.class_names[one] for one in classes]
    return "+".join(names) if len(names) <= 3 else f"{names[0]}..{names[-1]}"
