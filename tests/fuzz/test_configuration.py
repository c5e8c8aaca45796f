"""Settings as strangers write them: files, variables, and values of the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtool.config import find_preset, parse_assignment, resolve
from memtool.errors import ConfigError, MemtoolError
from memtool.paths import expand
from memtool.settings import keys
from memtool.yaml_file import parse_yaml
from tests.fuzz.door import NAMES, cases, damaged, long, refused_or_taken

pytestmark = long

WHOLE = find_preset("mira-dil").path.read_bytes()

_NUMBERS = ["nan", "inf", "-inf", "1e400", "0x10", "0o17", "017", "1:30", "1_000", "2024-01-01"]
VALUES = st.one_of(
    NAMES,
    st.sampled_from([*_NUMBERS, "1" * 5000, "-1", "9" * 30, "yes", "off", "null", "~"]),
    st.sampled_from(["a,b,,", "~nobody/x", "${NO}/x", "{}", "[]", "[[1]]"]),
    st.integers().map(str),
    st.floats().map(str),
)

_SCALARS = st.one_of(VALUES, st.sampled_from(["*a", "&a x", "!!int x", "!!python/name:os.system"]))
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
        st.dictionaries(_SCALARS, inner, max_size=3).map(
            lambda parts: "{" + ", ".join(f"{k}: {v}" for k, v in parts.items()) + "}"
        ),
    ),
    max_leaves=8,
)
_LINES = st.lists(
    st.tuples(st.one_of(st.sampled_from(sorted(keys())), st.just("train"), _SCALARS), _TREES).map(
        lambda pair: f"{pair[0]}: {pair[1]}"
    ),
    max_size=4,
).map("\n".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "given.yaml"


@cases
@given(content=st.one_of(damaged(WHOLE), _LINES.map(lambda text: text.encode(errors="replace"))))
@example(content=b"a: " + b"[" * 100_000)
@example(content=b"a: " + b"{a: " * 5_000)
@example(content=b"- " * 5_000)
@example(content=b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
@example(content=b"%YAML 1." + b"9" * 5_000 + b"\n---\na: 1\n")
@example(content=b'a: "\\UFFFFFFFF"\n')
@example(content=b'store: "\\uD800"\n')
@example(content=b"\xff\xfea\0:\0")
@example(content=b"\xef\xbb\xbfseed: 1\n")
@example(content=b"? [a, b]\n: c\n")
@example(content=b"--- a\n--- b\n")
@example(content=b"store: a\x1b[2J\n")
def test_a_file_of_settings(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with refused_or_taken():
        resolve(file=file, ambient=False)


@cases
@given(key=st.sampled_from(sorted(keys())), value=VALUES)
def test_a_value_of_the_command_line_and_of_a_variable(key: str, value: str) -> None:
    for given_as in ({"overrides": dict([parse_assignment(f"{key}={value}")])}, {}):
        variable = "MEMTOOL_" + key.replace(".", "__").upper()
        with refused_or_taken():
            resolve(environ={} if given_as else {variable: value}, **given_as)


@cases
@given(text=NAMES, name=NAMES)
def test_assignments_variables_and_paths(text: str, name: str) -> None:
    with refused_or_taken():
        resolve(overrides=dict([parse_assignment(text)]), ambient=False)
    with refused_or_taken():
        resolve(environ={f"MEMTOOL_{name}": text})
    with refused_or_taken():
        expand(text)
    with refused_or_taken():
        resolve(file=Path(text), ambient=False)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("a: &x 1\nb: *x\n", 2, "the alias *x"),
        ("seed: 1\nseed: 2\n", 2, "twice, first at line 1"),
        ("train:\n  lr: .inf\n", 2, "cannot be '.inf'"),
        ("train:\n  lr: inf\n", 2, "cannot be 'inf'"),
        ("seed: 1\n? [a]\n: b\n", 2, "as a key"),
        ("seed: 1\n\x07: b\n", 2, "cannot stand"),
        (f"seed: {'1' * 5000}\n", 1, "seed cannot be"),
        ("seed: 1\n--- \nseed: 2\n", 2, "a second document"),
    ],
)
def test_a_refusal_says_the_line(file: Path, content: str, line: int, said: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        resolve(file=file, ambient=False)
    assert caught.value.message.startswith(f"{file}:{line}: ")
    assert said in caught.value.message


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 2_000_000)
    for name, said in [("pipe.yaml", "pipe"), (".", "folder"), ("large.yaml", "limits.yaml_bytes")]:
        with pytest.raises(MemtoolError) as caught:
            resolve(file=tmp_path / name, ambient=False)
        assert said in str(caught.value)


def test_values_are_the_text_that_stands_there() -> None:
    words = ["007", "no", "1e-3", "2024-01-01", "1:30", "'null'", "null", "~", "", '""']
    tree = parse_yaml("".join(f"- {word}\n" for word in words), "x")
    assert tree is not None
    assert tree.plain() == [*words[:5], "null", None, None, None, ""]
