"""Which blobs there are: a tree of small pages, of which a commit writes those on its way alone.

A page is one element of `/parts`: JSON that names either blobs or further pages. A leaf holds up to
`LEAF` blobs, each with its first part, length and SHA-256. Where there would be more, the page has
a leaf for each next digit of the SHA-256 of the names. A page names another by its part, the number
of blobs below it, and its SHA-256: the one that the state of a version holds proves them all.

So a lookup reads as many pages as the logarithm of the number of blobs, a commit writes as many for
each blob, and two versions share all other pages. A version of an older schema has no pages: its
state lists the blobs, and each lies in an array of its own, also after later commits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from memtool_stores.errors import IntegrityError, SchemaError
from memtool_stores.jsonvalues import digest, items, mapping, parse, whole
from memtool_stores.names import check_ref
from memtool_stores.parts import PART_BYTES, parts_of

LEAF = 64
"""Blobs of one page at most."""

FREE_RUNS = 64
"""Runs of free parts that a state lists at most, the longest; others stay empty for good."""

DIGITS = "0123456789abcdef"

Pages = dict[tuple["Ref", str], "Page"]
"""Pages that were read, by what names them and the beginning of the names below them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One blob: its hash, and where it lies: from a part on, or in an array of its own."""

    sha256: str
    part: int | None = None
    nbytes: int = 0

    def to_json(self) -> list[Any]:
        """As a page has it."""
        return [self.sha256] if self.part is None else [self.sha256, self.part, self.nbytes]


@dataclass(frozen=True, slots=True)
class Ref:
    """A page: its part, its length, how many blobs are below it, and its hash."""

    part: int
    nbytes: int
    count: int
    sha256: str

    def to_json(self) -> list[Any]:
        """As a page or a state has it."""
        return [self.part, self.nbytes, self.count, self.sha256]

    @classmethod
    def of_json(cls, data: Any, parts: int) -> Ref:
        """What `to_json` gave; there are so many parts.

        Raises:
            SchemaError: it is not.
        """
        what = "a page of blobs"
        said = items(data, what)
        if len(said) != 4:
            raise SchemaError(f"{what} of {len(said)} things", expected="part, length, count, hash")
        part, nbytes, count = (whole(one, what) for one in said[:3])
        if part >= parts or not 0 < nbytes <= PART_BYTES or not count:
            raise SchemaError(
                f"{what} in part {part:,} of {parts:,}, {nbytes:,} bytes, {count:,} blobs",
                expected=f"a part that is there, at most {PART_BYTES:,} bytes, and some blob",
            )
        return cls(part, nbytes, count, digest(said[3], f"the hash of {what}"))


@dataclass(frozen=True)
class IndexState:
    """What the state of a version says of its blobs; `parts` are all elements that there ever were.

    `listed` are those of an older schema by name, each in an array of its own. `free` are runs of
    parts that hold nothing, each as its first and how many, which later commits write to.
    """

    parts: int = 0
    page: Ref | None = None
    listed: Mapping[str, Entry] = field(default_factory=dict)
    free: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """How many blobs there are."""
        return len(self.listed) if self.page is None else self.page.count

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        page = None if self.page is None else self.page.to_json()
        free = {"free": [*map(list, self.free)]} if self.free else {}
        return {"parts": self.parts, "page": page, **free}

    @classmethod
    def of_json(cls, data: Any) -> IndexState:
        """What `to_json` gave, or what an older schema says.

        Raises:
            SchemaError: it is neither.
        """
        said = mapping(data, "the blobs of the state")
        parts = whole(said.get("parts"), "the parts of the state")
        page = said.get("page")
        return cls(
            parts,
            None if page is None else Ref.of_json(page, parts),
            {
                check_ref(name, "blob"): Entry(digest(sha256, f"the hash of blob {name}"))
                for name, sha256 in mapping(said.get("listed", {}), "blobs of the state").items()
            },
            _free(said.get("free", []), parts),
        )


def _free(data: Any, parts: int) -> tuple[tuple[int, int], ...]:
    """Runs of free parts, one after the other.

    Raises:
        SchemaError: they are not, or not among so many parts.
    """
    what, found, end = "the free parts of the state", list[tuple[int, int]](), 0
    for run in items(data, what):
        numbers = [whole(one, what) for one in items(run, what)]
        first, count = numbers if len(numbers) == 2 else (0, 0)
        if first < end or not count or first + count > parts:
            raise SchemaError(
                f"{what}: {count:,} from part {first:,} on",
                expected=f"some, after part {end:,} and before part {parts:,}",
            )
        end = first + count
        found.append((first, count))
    return tuple(found)


@dataclass(frozen=True)
class Page:
    """A page as it was read: blobs by name, or pages by digit."""

    blobs: Mapping[str, Entry] = field(default_factory=dict)
    pages: Mapping[str, Ref] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many blobs are in it and below it."""
        return len(self.blobs) + sum(one.count for one in self.pages.values())

    def ref(self, part: int) -> Ref:
        """What names it where its bytes lie in this part."""
        data = self.data()
        return Ref(part, len(data), self.count, hashlib.sha256(data).hexdigest())

    def data(self) -> bytes:
        """Its bytes; equal pages have equal ones."""
        what, named = ("pages", self.pages) if self.pages else ("blobs", self.blobs)
        said = {what: {name: one.to_json() for name, one in named.items()}}
        return json.dumps(said, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def of(cls, data: bytes, ref: Ref, path: str, parts: int) -> Page:
        """The page with these bytes that `ref` names; all names below it begin with this `path`.

        Raises:
            SchemaError: we never wrote it there.
        """
        what = "a page of blobs"
        said = mapping(parse(data, what, unique=True), what)
        blobs = {
            check_ref(name, "blob"): _entry(one, name, parts)
            for name, one in mapping(said.get("blobs", {}), what).items()
        }
        pages = {
            digit: Ref.of_json(one, parts)
            for digit, one in mapping(said.get("pages", {}), what).items()
        }
        found = cls(blobs, pages)
        if (
            (blobs and pages)
            or found.count != ref.count
            or len(path) >= 64
            or not pages.keys() <= set(DIGITS)
            or not all(_path(name).startswith(path) for name in blobs)
        ):
            raise SchemaError(
                f"{what} of {len(blobs):,} blobs and {len(pages):,} pages at {path!r}",
                expected=f"{ref.count:,} blobs, all of that path",
            )
        return found


def _entry(data: Any, name: str, parts: int) -> Entry:
    what = f"blob {name!r} of a page"
    said = items(data, what)
    sha256 = digest(said[0] if said else None, f"the hash of {what}")
    if len(said) == 1:
        return Entry(sha256)
    if len(said) != 3:
        raise SchemaError(f"{what} of {len(said)} things", expected="a hash, a part and a length")
    part, nbytes = whole(said[1], what), whole(said[2], what)
    if part + parts_of(nbytes) > parts:
        raise SchemaError(
            f"{what} in part {part:,}, {nbytes:,} bytes", expected=f"inside of {parts:,} parts"
        )
    return Entry(sha256, part, nbytes)


def _path(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class Index(Mapping[str, Entry]):
    """The blobs of one version by name; a page is read when it is needed, and then remembered.

    `read` gives the bytes of parts, each with its length; `pages` are those that are known, and
    get those that are read or written.
    """

    def __init__(
        self,
        state: IndexState,
        read: Callable[[Sequence[tuple[int, int]]], Iterable[memoryview]],
        pages: Pages,
    ) -> None:
        self.state = state
        self._read = read
        self._pages = pages

    def page(self, ref: Ref, path: str) -> Page:
        """A page, whose bytes are those that its hash is of.

        Raises:
            IntegrityError: they are not, or no page of ours has them.
        """
        # By its path, too: one that belongs elsewhere is refused here whoever read it there.
        found = self._pages.get((ref, path))
        if found is None:
            try:
                (data,) = self._read([(ref.part, ref.nbytes)])
            except IntegrityError as error:
                raise _damaged(ref, error.expected or "what was written", error.found) from error
            found = self._pages[ref, path] = self._parsed(ref, path, bytes(data))
        return found

    def _parsed(self, ref: Ref, path: str, data: bytes) -> Page:
        found = hashlib.sha256(data).hexdigest()
        if found != ref.sha256:
            raise _damaged(ref, f"sha256 {ref.sha256}", found)
        try:
            return Page.of(data, ref, path, self.state.parts)
        except SchemaError as error:
            raise _damaged(ref, error.expected or "a page of blobs", error.message) from error

    def ahead(self, refs: Sequence[tuple[Ref, str]]) -> None:
        """Read pages at once that will be asked for; damage is left to who asks."""
        wanted = [one for one in refs if one not in self._pages]
        with suppress(IntegrityError):
            read = self._read([(ref.part, ref.nbytes) for ref, _ in wanted])
            for (ref, path), data in zip(wanted, read, strict=True):
                self._pages[ref, path] = self._parsed(ref, path, bytes(data))

    def __len__(self) -> int:
        return self.state.count

    def __getitem__(self, name: str) -> Entry:
        ref = self.state.page
        if ref is None:
            return self.state.listed[name]
        path, depth = _path(name), 0
        while True:
            page = self.page(ref, path[:depth])
            if not page.pages:
                return page.blobs[name]
            ref = page.pages.get(path[depth])
            if ref is None:
                raise KeyError(name)
            depth += 1

    def __iter__(self) -> Iterator[str]:
        for page in self.walk():
            yield from page.blobs

    def walk(self) -> Iterator[Page]:
        """All pages."""
        if self.state.page is None:
            yield Page(self.state.listed)
            return
        waiting = [(self.state.page, "")]
        while waiting:
            ref, path = waiting.pop()
            page = self.page(ref, path)
            yield page
            below = [(one, path + digit) for digit, one in page.pages.items()]
            self.ahead(below)
            waiting += below

    def items(self) -> ItemsView[str, Entry]:
        """Names and entries; each page is read once."""
        return {name: one for page in self.walk() for name, one in page.blobs.items()}.items()

    def changed(self, changes: Mapping[str, Entry | None], parts: Allotment) -> Changed:
        """The pages with these changes, None for a blob that goes.

        An index of an older schema gets pages for all that it lists.
        """
        made = Changed(parts)
        if self.state.page is None:
            there = {**self.state.listed, **changes}
            entries = {name: one for name, one in there.items() if one is not None}
            made.page = self._grown(made, entries, "") if entries else None
        else:
            made.page = self._with(made, self.state.page, changes, "")
        return made

    def _with(
        self, made: Changed, ref: Ref | None, changes: Mapping[str, Entry | None], path: str
    ) -> Ref | None:
        """The page instead of `ref`, None where no blob is left."""
        page = Page() if ref is None else self.page(ref, path)
        if ref is not None:
            made.parts.give_back(ref.part)
            self._pages.pop((ref, path), None)  # who still needs it reads it
        if not page.pages:
            there = {**page.blobs, **changes}
            entries = {name: one for name, one in there.items() if one is not None}
            return self._grown(made, entries, path) if entries else None
        pages: dict[str, Ref | None] = {**page.pages}
        for digit, some in _by_digit(changes, len(path)).items():
            pages[digit] = self._with(made, pages.get(digit), some, path + digit)
        kept = {digit: one for digit, one in pages.items() if one is not None}
        if sum(one.count for one in kept.values()) > LEAF:
            return self._written(made, Page(pages=kept), path)
        # As few as fit into one leaf are one: pages do not depend on what was before.
        blobs: dict[str, Entry] = {}
        for digit, one in kept.items():
            blobs |= self._emptied(made, one, path + digit)
        return self._grown(made, blobs, path) if blobs else None

    def _emptied(self, made: Changed, ref: Ref, path: str) -> dict[str, Entry]:
        """The blobs at and below a page, which goes."""
        new = made.written.pop(ref.part, None)
        made.parts.give_back(ref.part)
        page = self.page(ref, path) if new is None else new
        blobs = dict(page.blobs)
        for digit, one in page.pages.items():
            blobs |= self._emptied(made, one, path + digit)
        return blobs

    def _grown(self, made: Changed, entries: Mapping[str, Entry], path: str) -> Ref:
        """A page for these blobs, and those below it."""
        if len(entries) <= LEAF:
            return self._written(made, Page(entries), path)
        below = _by_digit(entries, len(path)).items()
        pages = {digit: self._grown(made, some, path + digit) for digit, some in below}
        return self._written(made, Page(pages=pages), path)

    def _written(self, made: Changed, page: Page, path: str) -> Ref:
        """Write a page, which the next commit then need not read."""
        ref = made.write(page)
        self._pages[ref, path] = page
        return ref


class Allotment:
    """Which parts a commit writes: free ones first, so that their number stays small.

    `free` are those that were free before the commit, as in `IndexState`.
    """

    def __init__(self, count: int, free: Iterable[tuple[int, int]] = ()) -> None:
        self.count = count
        self._ones: list[int] = []
        self._longer: list[tuple[int, int]] = []
        self._emptied: set[int] = set()
        for first, length in free:
            self._keep(first, length)

    def take(self, count: int) -> int:
        """The first of so many parts, one after the other: of the shortest run that has them."""
        if count == 1 and self._ones:
            first = self._ones.pop()
        elif (run := self._run_of(count)) is not None:
            first, length = run
            self._longer.remove(run)
            self._keep(first + count, length - count)
        else:
            first, self.count = self.count, self.count + count
        self._emptied.difference_update(range(first, first + count))
        return first

    def _run_of(self, count: int) -> tuple[int, int] | None:
        """The shortest run of several free parts that has so many; None where none has."""
        if count > 1 and all(length < count for _, length in self._longer):
            runs, self._ones, self._longer = self._runs(), [], []
            for first, length in runs:
                self._keep(first, length)
        fits = [run for run in self._longer if run[1] >= count]
        return min(fits, key=lambda run: run[1], default=None)

    def give_back(self, first: int, count: int = 1) -> None:
        """Parts that hold nothing any more."""
        self._emptied.update(range(first, first + count))
        self._keep(first, count)

    def _keep(self, first: int, count: int) -> None:
        if count == 1:
            self._ones.append(first)
        elif count:
            self._longer.append((first, count))

    @property
    def emptied(self) -> list[int]:
        """The parts that were given back and not taken again."""
        return sorted(self._emptied)

    @property
    def free(self) -> tuple[tuple[int, int], ...]:
        """The longest runs of parts that hold nothing, in their order."""
        return tuple(sorted(sorted(self._runs(), key=lambda run: -run[1])[:FREE_RUNS]))

    def _runs(self) -> list[tuple[int, int]]:
        """All runs of parts that hold nothing, as long as they are, in their order."""
        runs: list[tuple[int, int]] = []
        for first, count in sorted([*((one, 1) for one in self._ones), *self._longer]):
            if runs and sum(runs[-1]) == first:
                first, count = runs[-1][0], runs.pop()[1] + count
            runs.append((first, count))
        return runs


class Changed:
    """What a change of an index writes: pages by part."""

    def __init__(self, parts: Allotment) -> None:
        self.page: Ref | None = None
        self.written: dict[int, Page] = {}
        self.parts = parts

    def write(self, page: Page) -> Ref:
        """Give a new page its part."""
        part = self.parts.take(1)
        self.written[part] = page
        return page.ref(part)


def _by_digit(named: Mapping[str, Any], depth: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, one in named.items():
        found.setdefault(_path(name)[depth], {})[name] = one
    return found


def _damaged(ref: Ref, expected: str, found: str) -> IntegrityError:
    return IntegrityError(what="index", name=f"part {ref.part}", expected=expected, found=found)
