"""YAML files as people send them to each other: a tree of text, and nothing else of YAML.

Every value is the text that stands in the file, so that `007`, `no` and `1e-3` are what they look
like, and whoever asks for a number reads it from there. Only an empty value, `~` and `null` without
quotes are none. Aliases, tags other than those of plain values, keys that are no text and keys that
come twice are refused; nothing is run, and nothing is larger than the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memtool.errors import ConfigError, NotFoundError
from memtool_stores.errors import SchemaError
from memtool_stores.files import read_ordinary
from memtool_stores.printable import printable, shown

MOST_LEVELS = 16
"""Lists and sections inside each other; ours have three."""

MOST_VALUES = 30_000
"""Values in a file, which are what takes a parser its time; the classes of ImageNet are 21,841."""

_NONE = frozenset({"", "~", "null", "Null", "NULL"})
_CORE = "tag:yaml.org,2002:"
_TAGS = frozenset(
    {None, "!", *(_CORE + word for word in ("str", "int", "float", "bool", "null", "seq", "map"))}
)


@dataclass(frozen=True)
class Node:
    """A value and the line (from 1) where it begins, or where its key stands."""

    value: str | list[Node] | dict[str, Node] | None
    line: int

    def plain(self) -> Any:
        """The value as text, None, lists and dicts."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value


def read_yaml(path: Path, name: str, *, remedy: str | None = None) -> Node | None:
    """The tree of a YAML file, None where it has no content; `name` is what messages call it.

    Raises NotFoundError, with `remedy`, where there is no file; ConfigError, with the line where
    there is one, for what is no ordinary file, too large (limits.yaml_bytes), no text, or no YAML
    that this module reads.
    """
    name = printable(name)
    try:
        data = read_ordinary(path, "yaml_bytes")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {name}", remedy=remedy) from error
    except SchemaError as error:
        raise ConfigError(error.message, expected=error.expected, remedy=error.remedy) from error
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be read: {error.strerror}", remedy="check its path and permissions"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: cannot be read as text: byte {error.start} is not UTF-8",
            remedy="save it as UTF-8",
        ) from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Node | None:
    """As `read_yaml`, of text that was read already."""
    try:
        return _Tree(text, name).root()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise _not_yaml(place, str(error.problem or error.context)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character {shown(text[error.position : error.position + 1])}"
        raise _not_yaml(f"{name}:{line}", f"{what} cannot stand in a file of text") from error
    except (ValueError, OverflowError) as error:
        # An escape that names no character, and numbers of a directive that Python does not read.
        raise _not_yaml(name, str(error)) from error


def _not_yaml(place: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{place}: not YAML: {printable(problem)}",
        expected="lines `key: value`, indented by spaces, lists as [a, b]",
        remedy="put text with other marks between quotes",
    )


class _Tree:
    """A tree from the parser's events, which come one by one: what is refused is never built."""

    def __init__(self, text: str, name: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._name = name
        self._values = 0

    def root(self) -> Node | None:
        found: list[Node] = []
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if found:
                    raise self._refused(event, "a second document", "one document a file")
                found.append(self._node(next(self._events), 1))
        return found[0] if found and found[0].value is not None else None

    def _node(self, event: Any, level: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            raise self._refused(event, f"the alias *{event.anchor}", "the value itself")
        if event.tag not in _TAGS:
            raise self._refused(event, f"the tag {event.tag}", "text, lists and `key: value`")
        if level > MOST_LEVELS:
            raise self._refused(
                event, f"{level} levels", f"at most {MOST_LEVELS} inside each other"
            )
        self._values += 1
        if self._values > MOST_VALUES:
            raise self._refused(event, f"more than {MOST_VALUES:,} values", "fewer")
        line = event.start_mark.line + 1
        match event:
            case yaml.ScalarEvent():
                return Node(self._scalar(event), line)
            case yaml.SequenceStartEvent():
                return Node(list(self._items(level)), line)
            case _:
                return Node(self._mapping(level), line)

    def _scalar(self, event: Any) -> str | None:
        value = str(event.value)
        if event.implicit[0] and value in _NONE:
            return None
        if "\0" in value or not _is_unicode(value):
            raise self._refused(event, f"the value {shown(value)}", "text without NUL, in UTF-8")
        return value

    def _items(self, level: int) -> Iterator[Node]:
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            yield self._node(event, level + 1)

    def _mapping(self, level: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, level + 1)
            if not isinstance(key.value, str):
                what = "nothing" if key.value is None else "a list or section"
                raise self._refused(event, f"{what} as a key", "text before the colon")
            if key.value in found:
                first = found[key.value].line
                raise self._refused(
                    event, f"{shown(key.value)} is set twice, first at line {first}", "it once"
                )
            found[key.value] = Node(self._node(next(self._events), level + 1).value, key.line)
        return found

    def _refused(self, event: Any, what: str, expected: str) -> ConfigError:
        return ConfigError(
            f"{self._name}:{event.start_mark.line + 1}: {printable(what)}",
            expected=expected,
            remedy="leave it out, or write it in another way",
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
