r"""Names of layers as PEFT files write them: a small part of regular expressions, in linear time.

A pattern from a stranger never reaches the engine of `re`, where a short one can run for years. The
part that people write is read here: characters and escaped signs, `.`, `\d`, `\w`, `\s`, sets such
as `[0-9a-z_]`, groups with `|`, the repetitions `*`, `+`, `?` and `{m,n}`, `^` at the beginning and
`$` at the end. What it matches is what `re` says. Its automaton is Glushkov's, with a place for
every character of the pattern; none is visited twice at one character of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from memtool.errors import CorruptError, MismatchError
from memtool_stores.printable import shown

LONGEST = 400
"""Characters of a pattern; also places of its automaton, once repetitions are written out."""

DEEPEST = 20
"""Groups within groups."""

Accepts = Callable[[str], bool]


@dataclass(frozen=True)
class _Part:
    """A part of an automaton. Sets of places are numbers, with a bit for each.

    `first` and `last` are the places that a match can begin and end at; `empty` says whether it
    matches nothing as well.
    """

    first: int = 0
    last: int = 0
    empty: bool = True

    def or_nothing(self) -> _Part:
        """The same part, optional."""
        return _Part(self.first, self.last, True)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern that `compiled` read.

    `accepts[p]` says which characters place p takes, `follow[p]` which places come after it. The
    whole matches what one of `anchored` (they begin with `^`) or `free` does.
    """

    accepts: tuple[Accepts, ...]
    follow: tuple[int, ...]
    anchored: tuple[_Part, ...]
    free: tuple[_Part, ...]

    def matches(self, text: str) -> bool:
        """Whether it matches the whole text: `re.fullmatch(pattern, text)`."""
        return self._run(text, ends=False)

    def matches_end(self, name: str) -> bool:
        r"""Whether it matches the dotted name of a layer, or all that follows one of its dots.

        This is how peft looks a layer up: `re.match(rf"(.*\.)?({pattern})$", name)`.
        """
        return self._run(name, ends=True)

    @cached_property
    def simple(self) -> bool:
        """Whether it is a row of characters, without choice or repetition, as most patterns are."""
        count = len(self.accepts)
        row = tuple(2 << place for place in range(count - 1))
        return (
            count > 0
            and self.follow == (*row, 0)
            and (*self.anchored, *self.free) == (_Part(1, 1 << (count - 1), False),)
        )

    def _run(self, text: str, *, ends: bool) -> bool:
        if self.simple:
            return self._spelled(text, ends=ends)
        parts = (*self.anchored, *self.free)
        # Nothing is left of the text, or of what follows its last dot.
        left = parts if not text else self.free if ends and text[-1] == "." else ()
        if any(part.empty for part in left):
            return True
        again = _union(part.first for part in self.free) if ends else 0
        here, last = 0, _union(part.last for part in parts)
        reached = _union(part.first for part in parts)
        for c in text:
            here = _union(1 << place for place in _bits(reached) if self.accepts[place](c))
            if not here and not again:
                return False
            reached = _union(self.follow[place] for place in _bits(here))
            if c == ".":
                reached |= again
        return bool(here & last)

    def _spelled(self, text: str, *, ends: bool) -> bool:
        start = len(text) - len(self.accepts)
        if start < 0 or (start > 0 and not (ends and self.free and text[start - 1] == ".")):
            return False
        return all(accepts(c) for accepts, c in zip(self.accepts, text[start:], strict=True))


def compiled(pattern: str, where: str) -> Pattern:
    """The pattern, read; `where` names its place in errors.

    Raises CorruptError for what is no regular expression, MismatchError for one that has more than
    is read here.
    """
    return _Reader(pattern, where).whole()


class _Reader:
    """Reads a pattern from left to right and builds its automaton."""

    def __init__(self, pattern: str, where: str) -> None:
        self.text = pattern
        self.where = where
        self.at = 0
        self.atoms = 0
        self.accepts: list[Accepts] = []
        self.follow: list[int] = []

    def whole(self) -> Pattern:
        if len(self.text) > LONGEST:
            raise self._beyond(f"{len(self.text)} characters", f"at most {LONGEST}")
        ways: dict[bool, list[_Part]] = {True: [], False: []}
        while True:
            anchored = self._take("^")
            ways[anchored].append(self._row(0))
            if self._take("$") and self._next() not in ("", "|"):
                self.at -= 1
                raise self._beyond("a `$` before the end")
            if not self._take("|"):
                break
        if self._next():
            raise self._broken("a `)` that closes nothing")
        return Pattern(
            tuple(self.accepts), tuple(self.follow), tuple(ways[True]), tuple(ways[False])
        )

    # From the outside in: ways of a group, a row of pieces, a piece repeated, a single one.

    def _ways(self, depth: int) -> _Part:
        parts = [self._row(depth)]
        while self._take("|"):
            parts.append(self._row(depth))
        return _Part(
            _union(part.first for part in parts),
            _union(part.last for part in parts),
            any(part.empty for part in parts),
        )

    def _row(self, depth: int) -> _Part:
        row = _Part()
        ends = ("", "|", ")") if depth else ("", "|", ")", "$")
        while self._next() not in ends:
            row = self._then(row, self._repeated(depth))
        return row

    def _repeated(self, depth: int) -> _Part:
        begin = self.at
        part = self._atom(depth)
        end = self.at
        repeat = self._repetition()
        if repeat is None:
            return part
        least, most = repeat
        after = self.at
        row = _Part()
        if most == 0:
            return row
        # Every copy has places of its own, so that the piece is read again for each.
        for copy in range(max(least, most or 1)):
            if copy:
                self.at = begin
                part = self._atom(depth)
                assert self.at == end
            if most is None and copy == max(least, 1) - 1:
                self._link(part.last, part.first)
            row = self._then(row, part if copy < least else part.or_nothing())
        self.at = after
        return row

    def _repetition(self) -> tuple[int, int | None] | None:
        """How often at least and at most, where something says it; lazy ones match the same."""
        sign = self._next()
        if not sign or sign not in "*+?{":
            return None
        self.at += 1
        found: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(
            sign, (0, None)
        )
        if sign == "{":
            inside, brace, _ = self.text[self.at :].partition("}")
            low, comma, high = inside.partition(",")
            numbers = [number for number in (low, high) if number]
            if not (brace and numbers) or not all(
                number.isascii() and number.isdigit() and len(number) < 5 for number in numbers
            ):
                self.at -= 1
                raise self._beyond("a `{` that is no repetition", "{m}, {m,} or {m,n}")
            least = int(low or 0)
            found = (least, (int(high) if high else None) if comma else least)
            if found[1] is not None and found[1] < least:
                raise self._broken("a repetition that ends before it begins")
            self.at += len(inside) + 1
        if self._next() == "+":
            raise self._beyond("a possessive repetition")
        self._take("?")
        if self._next() and self._next() in "*+?":
            raise self._broken("a repetition of a repetition")
        return found

    def _atom(self, depth: int) -> _Part:
        self.atoms += 1
        if self.atoms > 10 * LONGEST:
            raise self._beyond("repetitions of repetitions", f"{LONGEST} characters written out")
        c = self._next()
        self.at += 1
        match c:
            case "(":
                return self._group(depth + 1)
            case "[":
                return self._place(self._set())
            case ".":
                return self._place(_any)
            case "\\":
                return self._place(self._escaped())
            case "*" | "+" | "?":
                self.at -= 1
                raise self._broken("nothing to repeat")
            case "^" | "$" | "{" | "}" | "]":
                self.at -= 1
                raise self._beyond(f"a `{c}` in that place", f"\\{c} for the sign itself")
        return self._place(c.__eq__)

    def _group(self, depth: int) -> _Part:
        if depth > DEEPEST:
            raise self._beyond("groups in groups", f"at most {DEEPEST} deep")
        if self._take("?") and not self._take(":"):
            self.at -= 1
            raise self._beyond("a group that begins with `(?`", "( ) or (?: )")
        part = self._ways(depth)
        if not self._take(")"):
            raise self._broken("a group that is not closed")
        return part

    def _escaped(self) -> Accepts:
        c = self._next()
        if not c:
            raise self._broken("a \\ at the end")
        if c.isascii() and c.isalnum():
            if c not in _KINDS:
                self.at -= 1
                raise self._beyond(f"\\{c}", "\\d, \\w, \\s, or a sign")
            self.at += 1
            return _KINDS[c]
        self.at += 1
        return c.__eq__

    def _set(self) -> Accepts:
        inverse = self._take("^")
        members: list[Accepts] = []
        while self._next() != "]" or not members:
            low = self._member()
            if self._next() == "-" and self.text[self.at + 1 :][:1] != "]":
                self.at += 1
                high = self._member()
                if not (isinstance(low, str) and isinstance(high, str) and low <= high):
                    raise self._broken("a range that ends before it begins")
                members.append(_range(low, high))
            else:
                members.append(low.__eq__ if isinstance(low, str) else low)
        self.at += 1
        return lambda c: any(accepts(c) for accepts in members) != inverse

    def _member(self) -> str | Accepts:
        c = self._next()
        if not c:
            raise self._broken("a set that is not closed")
        if c == "[" or c == "]" or self.text[self.at :][:2] in ("--", "&&", "||", "~~"):
            raise self._beyond(f"a `{c}` in that place", f"\\{c} for the sign itself")
        self.at += 1
        if c != "\\":
            return c
        sign = self._next()
        accepts = self._escaped()
        return accepts if sign in _KINDS else sign

    # The automaton.

    def _place(self, accepts: Accepts) -> _Part:
        if len(self.accepts) == LONGEST:
            raise self._beyond("repetitions", f"{LONGEST} characters, once they are written out")
        self.accepts.append(accepts)
        self.follow.append(0)
        here = 1 << (len(self.accepts) - 1)
        return _Part(here, here, False)

    def _then(self, before: _Part, after: _Part) -> _Part:
        self._link(before.last, after.first)
        return _Part(
            before.first | (after.first if before.empty else 0),
            after.last | (before.last if after.empty else 0),
            before.empty and after.empty,
        )

    def _link(self, ends: int, begins: int) -> None:
        for place in _bits(ends):
            self.follow[place] |= begins

    # The text.

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, sign: str) -> bool:
        found = self._next() == sign
        self.at += found
        return found

    def _broken(self, what: str) -> CorruptError:
        return CorruptError(
            f"{self.where} has {shown(self.text)}, no regular expression: {what}, at character "
            f"{self.at + 1}"
        )

    def _beyond(self, what: str, expected: str | None = None) -> MismatchError:
        return MismatchError(
            f"{self.where} has {shown(self.text)}: {what}, at character {self.at + 1}; patterns of "
            "others are not run, and of regular expressions only the simple ones are read",
            expected=expected or "characters, `.`, sets, groups with `|`, and * + ? {m,n}",
            remedy="write out the names of the layers, as blocks.0.attn.qkv",
        )


def _any(c: str) -> bool:
    return c != "\n"


def _range(low: str, high: str) -> Accepts:
    return lambda c: low <= c <= high


def _not(accepts: Accepts) -> Accepts:
    return lambda c: not accepts(c)


def _word(c: str) -> bool:
    return c.isalnum() or c == "_"


_KINDS: dict[str, Accepts] = {
    "d": str.isdecimal,
    "D": _not(str.isdecimal),
    "w": _word,
    "W": _not(_word),
    "s": str.isspace,
    "S": _not(str.isspace),
}


def _union(sets: Iterable[int]) -> int:
    whole = 0
    for places in sets:
        whole |= places
    return whole


def _bits(places: int) -> Iterator[int]:
    """The places in a set."""
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest
