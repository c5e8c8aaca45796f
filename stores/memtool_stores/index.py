"""Which blobs there are: a tree of small pages, of which a commit writes the first and few others.

A page is one element of `/parts`: JSON that names blobs and further pages. A leaf holds up to
`LEAF` blobs, each with its first part, length and SHA-256. Where there would be more, the page has
a page for each next digit of the SHA-256 of the names. A page names another by its part, the number
of blobs in the leaves below it, and its SHA-256: the one that the state of a version holds proves
them all. Of a leaf it also says the last digits of its names: one that is not there, as that of a
new blob, is told without reading the leaf.

What changes waits in the first page, which every change writes: a name in a page goes before the
same name further down, null says that the blob is gone; that goes down at once, so that no page
names it any more. When more than `LEAF` names wait in a page,
those of the digit that has most go one page down (a buffered tree: Brodal and Fagerberg, Lower
bounds for external memory dictionaries, SODA 2003). So a lookup reads as many pages as the
logarithm of the number of blobs, a commit writes one page, now and then some more, whatever that
number is, and two versions share all others. A version of an older schema than 4 has no pages: its
state lists the blobs, and each lies in an array of its own, also after later commits.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from memtool_stores.errors import IntegrityError, SchemaError
from memtool_stores.jsonvalues import digest, items, mapping, parse, text, whole
from memtool_stores.names import check_ref
from memtool_stores.parts import PART_BYTES, parts_of

LEAF = 64
"""Names of one page at most."""

FREE_RUNS = 64
"""Runs of free parts that a state lists at most, the longest; others stay empty for good."""

DIGITS = "0123456789abcdef"

TOLD = 4
"""Digits that are told of each name in a leaf: one new name in a thousand has those of another."""

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
    """A page: its part, its length, how many blobs its leaves hold, and its hash.

    `told` are the last digits of the names of a leaf, ascending; "" of other pages, and of one that
    was written before they were told.
    """

    part: int
    nbytes: int
    count: int
    sha256: str
    told: str = ""

    def to_json(self) -> list[Any]:
        """As a page or a state has it."""
        told = [self.told] if self.told else []
        return [self.part, self.nbytes, self.count, self.sha256, *told]

    def may_have(self, path: str) -> bool:
        """Whether the blob whose name has this SHA-256 may be in it, or below it."""
        places = range(0, len(self.told), TOLD)
        return not self.told or path[-TOLD:] in (self.told[at : at + TOLD] for at in places)

    @classmethod
    def of_json(cls, data: Any, parts: int) -> Ref:
        """What `to_json` gave; there are so many parts.

        Raises:
            SchemaError: it is not.
        """
        what = "a page of blobs"
        said = items(data, what)
        if len(said) not in {4, 5}:
            raise SchemaError(
                f"{what} of {len(said)} things", expected="part, length, count, hash, digits"
            )
        part, nbytes, count = (whole(one, what) for one in said[:3])
        if part >= parts or not 0 < nbytes <= PART_BYTES or not count:
            raise SchemaError(
                f"{what} in part {part:,} of {parts:,}, {nbytes:,} bytes, {count:,} blobs",
                expected=f"a part that is there, at most {PART_BYTES:,} bytes, and some blob",
            )
        told = text(said[4], f"the digits of {what}") if said[4:] else ""
        return cls(part, nbytes, count, digest(said[3], f"the hash of {what}"), told)


@dataclass(frozen=True)
class IndexState:
    """What the state of a version says of its blobs; `parts` are all elements that there ever were.

    `count` is how many there are, also of those that wait in pages. `listed` are those of an older
    schema by name, each in an array of its own. `free` are runs of parts that hold nothing, each as
    its first and how many, which later commits write to.
    """

    parts: int = 0
    page: Ref | None = None
    count: int = 0
    listed: Mapping[str, Entry] = field(default_factory=dict)
    free: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        page = None if self.page is None else self.page.to_json()
        free = {"free": [*map(list, self.free)]} if self.free else {}
        return {"parts": self.parts, "page": page, "count": self.count, **free}

    @classmethod
    def of_json(cls, data: Any) -> IndexState:
        """What `to_json` gave, or what an older schema says.

        Raises:
            SchemaError: it is neither.
        """
        said = mapping(data, "the blobs of the state")
        parts = whole(said.get("parts"), "the parts of the state")
        page = said.get("page")
        listed = {
            check_ref(name, "blob"): Entry(digest(sha256, f"the hash of blob {name}"))
            for name, sha256 in mapping(said.get("listed", {}), "blobs of the state").items()
        }
        count = whole(said.get("count"), "the number of blobs of the state")
        if page is None and count != len(listed):
            raise SchemaError(f"{count:,} blobs and no page of them", expected=f"{len(listed):,}")
        return cls(
            parts,
            None if page is None else Ref.of_json(page, parts),
            count,
            listed,
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
    """A page as it was read: a leaf with its blobs by name, or pages by digit.

    In one with pages, blobs are those that wait to go down, None for one that is gone.
    """

    blobs: Mapping[str, Entry | None] = field(default_factory=dict)
    pages: Mapping[str, Ref] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many blobs are in it, when it is a leaf, or in the leaves below it."""
        return sum(one.count for one in self.pages.values()) if self.pages else len(self.blobs)

    @property
    def told(self) -> str:
        """As `Ref.told`."""
        return "" if self.pages else "".join(sorted(_path(name)[-TOLD:] for name in self.blobs))

    def ref(self, part: int) -> Ref:
        """What names it where its bytes lie in this part."""
        data = self.data()
        return Ref(part, len(data), self.count, hashlib.sha256(data).hexdigest(), self.told)

    def data(self) -> bytes:
        """Its bytes; equal pages have equal ones."""
        said: dict[str, dict[str, Any]] = {}
        if self.blobs:
            blobs = self.blobs.items()
            said["blobs"] = {name: None if one is None else one.to_json() for name, one in blobs}
        if self.pages:
            said["pages"] = {digit: one.to_json() for digit, one in self.pages.items()}
        return json.dumps(said, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def of(cls, data: bytes, ref: Ref, path: str, parts: int) -> Page:
        """The page with these bytes that `ref` names; all names below it begin with this `path`.

        Raises:
            SchemaError: we never wrote it there.
        """
        what = "a page of blobs"
        said = mapping(parse(data, what, unique=True), what)
        pages = {
            digit: Ref.of_json(one, parts)
            for digit, one in mapping(said.get("pages", {}), what).items()
        }
        blobs = {
            check_ref(name, "blob"): None if pages and one is None else _entry(one, name, parts)
            for name, one in mapping(said.get("blobs", {}), what).items()
        }
        found = cls(blobs, pages)
        if (
            found.count != ref.count
            or ref.told not in {"", found.told}
            or len(blobs) > LEAF
            or len(path) >= 64
            or not pages.keys() <= set(DIGITS)
            or not all(_path(name).startswith(path) for name in blobs)
        ):
            raise SchemaError(
                f"{what} of {len(blobs):,} blobs and {len(pages):,} pages at {path!r}",
                expected=f"{ref.count:,} blobs in leaves, all of that path",
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
            found, ref = page.blobs.get(name), page.pages.get(path[depth])
            if found is not None:
                return found
            if ref is None or name in page.blobs or not ref.may_have(path):
                raise KeyError(name)
            depth += 1

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def walk(self) -> Iterator[Page]:
        """All pages, each before those below it, of which it says what is newer."""
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
        found: dict[str, Entry | None] = {}
        for page in self.walk():
            for name, one in page.blobs.items():
                found.setdefault(name, one)
        return _there(found).items()

    def allotment(self) -> Allotment:
        """The parts for a change: the free ones, and that of the first page, which it replaces."""
        parts = Allotment(self.state.parts, self.state.free)
        if self.state.page is not None:
            parts.give_back(self.state.page.part)
        return parts

    def changed(self, changes: Mapping[str, Entry | None], parts: Allotment) -> Changed:
        """The pages with these changes, None for a blob that goes; `parts` are of `allotment`.

        An index of an older schema gets pages for all that it lists.
        """
        there = sum(name in self for name in changes)
        count = self.state.count + len(_there(changes)) - there
        made = Changed(parts, whole(count, "the number of blobs"))
        first = self.state.page
        if first is not None and count > LEAF:
            made.page = self._with(made, first, changes, "")
            return made
        few = self.state.listed if first is None else self._emptied(made, first, "")
        entries = _there({**few, **changes})
        made.count = len(entries)
        made.page = self._grown(made, entries, "") if entries else None
        return made

    def _with(
        self, made: Changed, ref: Ref | None, changes: Mapping[str, Entry | None], path: str
    ) -> Ref | None:
        """The page instead of `ref`, None where no blob is left."""
        page = Page()
        if ref is not None:
            page = self.page(ref, path)
            self._give_back(made, ref, path)
        waiting = {**page.blobs, **changes}
        if not page.pages:
            entries = _there(waiting)
            return self._grown(made, entries, path) if entries else None
        pages: dict[str, Ref | None] = {**page.pages}
        by_digit = _by_digit(waiting, len(path))
        gone = {digit for digit, some in by_digit.items() if None in some.values()}
        lots = sorted(by_digit.items(), key=lambda lot: (lot[0] in gone, len(lot[1])))
        while lots and (lots[-1][0] in gone or len(waiting) > LEAF):
            digit, most = lots.pop()
            pages[digit] = self._with(made, pages.get(digit), most, path + digit)
            waiting = {name: one for name, one in waiting.items() if name not in most}
        kept = {digit: one for digit, one in pages.items() if one is not None}
        if sum(one.count for one in kept.values()) > LEAF:
            return self._written(made, Page(waiting, kept), path)
        # As few as fit into one leaf are one.
        below: dict[str, Entry | None] = {}
        for digit, one in kept.items():
            below |= self._emptied(made, one, path + digit)
        entries = _there({**below, **waiting})
        return self._grown(made, entries, path) if entries else None

    def _emptied(self, made: Changed, ref: Ref, path: str) -> dict[str, Entry | None]:
        """What is said of blobs at and below a page, which goes."""
        new = made.written.pop(ref.part, None)
        page = self.page(ref, path) if new is None else new
        self._give_back(made, ref, path)
        blobs: dict[str, Entry | None] = {}
        for digit, one in page.pages.items():
            blobs |= self._emptied(made, one, path + digit)
        return {**blobs, **page.blobs}

    def _give_back(self, made: Changed, ref: Ref, path: str) -> None:
        if path:  # the first page's is in the allotment
            made.parts.give_back(ref.part)
        self._pages.pop((ref, path), None)  # who still needs it reads it

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

    Of single ones the first. What is asked for last, the first page, so comes to lie behind all
    others, in the manifest that every commit writes. `free` are those that were free before the
    commit, as in `IndexState`.
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
            first = heapq.heappop(self._ones)
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
            heapq.heappush(self._ones, first)
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
    """What a change of an index writes: pages by part; and how many blobs there are then."""

    def __init__(self, parts: Allotment, count: int) -> None:
        self.page: Ref | None = None
        self.count = count
        self.written: dict[int, Page] = {}
        self.parts = parts

    def write(self, page: Page) -> Ref:
        """Give a new page its part."""
        part = self.parts.take(1)
        self.written[part] = page
        return page.ref(part)


def _there(named: Mapping[str, Entry | None]) -> dict[str, Entry]:
    """Those that are not gone."""
    return {name: one for name, one in named.items() if one is not None}


def _by_digit(named: Mapping[str, Any], depth: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, one in named.items():
        found.setdefault(_path(name)[depth], {})[name] = one
    return found


def _damaged(ref: Ref, expected: str, found: str) -> IntegrityError:
    return IntegrityError(what="index", name=f"part {ref.part}", expected=expected, found=found)
