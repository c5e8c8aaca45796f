"""Patterns of strangers: the part that is read means what `re` says, and is never slow."""

import re
import time
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtool.adapters.patterns import LONGEST, Pattern, compiled
from memtool.errors import CorruptError, MemtoolError, MismatchError
from tests.fuzz.door import cases, long

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\s",
        r"\W",
        "[ab]",
        "[^a.]",
        "[0-9_]",
        r"[\d.-]",
        "é",
    ]
)
REPEATED = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}"])
BRANCHES = st.recursive(
    st.tuples(ATOMS, REPEATED).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(st.lists(inner, min_size=1, max_size=3).map("|".join), REPEATED).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map(lambda part: f"(?:{part})"),
    ),
    max_leaves=6,
)
PATTERNS = st.lists(
    st.tuples(st.sampled_from(["", "", "^"]), BRANCHES, st.sampled_from(["", "", "$"])).map(
        "".join
    ),
    min_size=1,
    max_size=3,
).map("|".join)
TEXTS = st.text(alphabet="ab.0 é-", max_size=8)


def agrees(pattern: str, read: Pattern, text: str) -> None:
    assert read.matches(text) == bool(re.fullmatch(pattern, text)), (pattern, text)
    as_peft = bool(re.match(rf"(.*\.)?({pattern})$", text))
    assert read.matches_end(text) == as_peft, (pattern, text)


@long
@cases
@given(pattern=PATTERNS, texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_what_is_read_matches_what_re_says(pattern: str, texts: list[str]) -> None:
    read = compiled(pattern, "here")
    for text in texts:
        agrees(pattern, read, text)


@long
@cases
@given(
    pattern=st.text(alphabet="ab.\\d0-9,^$*+?{}[]()|:", max_size=12),
    texts=st.lists(TEXTS, min_size=1, max_size=6),
)
@example("a{0}", ["", "a"])
@example("[\\d-a]", ["-"])
@example("a**", ["a"])
@example("(?:^a|b)", ["b"])
def test_what_is_not_read_is_refused_and_nothing_else_is_run(
    pattern: str, texts: list[str]
) -> None:
    refused: MemtoolError | None = None
    try:
        read = compiled(pattern, "the file: rank_pattern")
    except (CorruptError, MismatchError) as error:
        refused = error
    if refused is not None:
        assert "the file: rank_pattern has" in refused.message
        assert "at character" in refused.message
        if isinstance(refused, CorruptError):
            with pytest.raises(re.error), warnings.catch_warnings(action="ignore"):
                re.compile(pattern)
        return
    for text in texts:
        agrees(pattern, read, text)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(1[0-9]|2\d)\.self_attn\.(q|k|v|o)_proj",
        r"^blocks\.\d+\.attn\.qkv$",
        "blocks.0.attn.qkv",
        r"(?:.*\.)?mlp\.fc[12]",
    ],
)
def test_patterns_that_people_write_are_read(pattern: str) -> None:
    read = compiled(pattern, "here")
    names = [
        "blocks.0.attn.qkv",
        "x.blocks.0.attn.qkv",
        "blocks.10.mlp.fc2",
        "model.layers.17.self_attn.q_proj",
        "model.layers.7.self_attn.v_proj",
    ]
    for name in names:
        agrees(pattern, read, name)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?!vision).*", "begins with `(?`"),
        ("(?i)Q", "begins with `(?`"),
        ("(?P<x>q)", "begins with `(?`"),
        (r"(a)\1", r"\1"),
        (r"\bq", r"\b"),
        ("a++", "possessive"),
        ("a$b", "`$` before the end"),
        ("(^a)", "`^` in that place"),
        ("a" * (LONGEST + 1), f"{LONGEST + 1} characters"),
        ("a{999}", "repetitions"),
        ("(((a{9}){9}){9}){9}", "repetitions"),
        ("((((){999}){999}){999}){999}", "repetitions"),
        ("(" * 50 + "a" + ")" * 50, "groups in groups"),
    ],
)
def test_more_than_that_is_named(pattern: str, said: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(said)) as caught:
        compiled(pattern, "adapter_config.json: alpha_pattern")
    assert "adapter_config.json: alpha_pattern" in caught.value.message
    assert "write out the names" in str(caught.value.remedy)


@pytest.mark.parametrize("pattern", ["(", ")", "[a", "a)", "*a", "a**", "[b-a]", "a{2,1}", "\\"])
def test_what_is_no_regular_expression_is_corrupt(pattern: str) -> None:
    with pytest.raises(CorruptError, match="no regular expression"):
        compiled(pattern, "here")


HOSTILE = ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*)*b", "(a|aa)+b", ".*.*.*.*.*.*.*.*.*b", "(a?){60}b"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_take_linear_time(pattern: str) -> None:
    read, times = compiled(pattern, "here"), []
    for length in (500, 4_000):
        begin = time.process_time()
        assert not read.matches("a" * length)
        assert not read.matches_end("a." * (length // 2))
        times.append(time.process_time() - begin)
    # Eight times the text; quadratic would be 64 times.
    assert times[1] < 24 * times[0] + 0.05


@cases
@given(pattern=st.text(alphabet="a.\\*+?{}2,[]()|", max_size=30))
def test_any_pattern_is_read_or_refused_at_once(pattern: str) -> None:
    try:
        read = compiled(pattern, "here")
    except MemtoolError:
        return
    begin = time.process_time()
    read.matches_end("a.aaaa." * 30)
    assert time.process_time() - begin < 1
