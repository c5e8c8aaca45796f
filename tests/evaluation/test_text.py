"""Metrics of answers in text, against values worked out by hand and a slow oracle."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from memtool.errors import ConfigError, DataError, MismatchError
from memtool.evaluation.text import (
    edit_similarity,
    exact_match,
    first_character,
    first_number,
    number,
    rouge_l,
    sari,
    score,
    simplified_paragraph,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("A", "A", 1), (" \nB. hawkish", "B", 1), ("a", "A", 0), ("", "A", 0), ("C\nThe", "C\nIt", 1)],
)
def test_first_character(prediction: str, answer: str, right: float) -> None:
    assert first_character(prediction, answer) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("17.480 km", "17.48", 1),
        ("The answer is 1,680.", "1680", 1),
        ("-3", "3", 0),
        ("−3 degrees", "-3", 1),
        (".5", "0.5", 1),
        ("10", "1", 0),
        ("1e3", "1000", 1),
        ("1,2,3", "1", 1),
        ("1,680,000 in all", "1680000", 1),
        ("1e99999999999999999999", "1", 0),
        ("7", "1e99999999999999999999", 0),
        ("no idea", "4", 0),
        ("august ", "August", 1),
        ("4 in May", "May", 0),
    ],
)
def test_number(prediction: str, answer: str, right: float) -> None:
    assert number(prediction, answer) == right


def test_a_text_without_a_number_has_none() -> None:
    assert first_number("none, at all.") is None
    assert first_number("1e99999999999999999999") is None


def test_exact_match() -> None:
    assert exact_match(" Very  Negative\n", "very negative") == 1
    assert exact_match("negative", "very negative") == 0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # 3 of 4 words said, 3 of 6 words wanted
    found = rouge_l("the cat sat quietly", "the old cat sat on it")
    assert found == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))


def test_edit_similarity_counts_insertions_and_deletions() -> None:
    assert edit_similarity("return True", "return True") == 1
    assert edit_similarity("abcd", "abxd") == pytest.approx(1 - 2 / 8)


def oracle(source: str, prediction: str, answer: str) -> float:
    """SARI with lists and exact fractions, one run of words at a time."""

    def runs(text: str, n: int) -> list[tuple[str, ...]]:
        words = text.lower().split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def share(part: int, whole: int) -> Fraction:
        return Fraction(part, whole) if whole else Fraction(1)

    sums = [Fraction(0)] * 5
    for n in range(1, 5):
        i, o, r = (runs(text, n) for text in (source, prediction, answer))
        kinds = set(i) | set(o) | set(r)
        added = [g for g in kinds if g in o and g not in i]
        to_add = [g for g in kinds if g in r and g not in i]
        rightly = [g for g in added if g in r]
        kept = {g: min(i.count(g), o.count(g)) for g in kinds}
        to_keep = {g: min(i.count(g), r.count(g)) for g in kinds}
        gone = {g: max(i.count(g) - o.count(g), 0) for g in kinds}
        to_go = {g: max(i.count(g) - r.count(g), 0) for g in kinds}
        rightly_kept = sum(min(kept[g], to_keep[g]) for g in kinds)
        rightly_gone = sum(min(gone[g], to_go[g]) for g in kinds)
        found = (
            share(len(rightly), len(added)),
            share(len(rightly), len(to_add)),
            share(rightly_kept, sum(kept.values())),
            share(rightly_kept, sum(to_keep.values())),
            share(rightly_gone, sum(gone.values())),
        )
        sums = [total + one / 4 for total, one in zip(sums, found, strict=True)]

    def f(p: Fraction, q: Fraction) -> Fraction:
        return 2 * p * q / (p + q) if p + q else Fraction(0)

    return float((f(sums[0], sums[1]) + f(sums[2], sums[3]) + sums[4]) / 3)


def test_sari_equals_the_oracle_on_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(300):
        texts = [" ".join(draw.choices("abcd", k=draw.randrange(9))) for _ in range(3)]
        assert sari(*texts) == pytest.approx(oracle(*texts), abs=1e-12)


def test_sari_worked_out_by_hand() -> None:
    # unigrams: nothing added of {x}; "a" kept of {a}; b, c deleted of {b, c}
    # bigrams to 4-grams: "a x" was to be added; there was nothing to keep; all was to be deleted
    found = sari("a b c", "a", "a x")
    add_precision, add_recall = 1.0, (0 + 0 + 1 + 1) / 4  # nothing was added: 0/0
    keep, delete = 1.0, 1.0
    add = 2 * add_precision * add_recall / (add_precision + add_recall)
    assert found == pytest.approx((add + keep + delete) / 3)


def test_sari_is_one_for_the_reference_and_lower_for_the_source() -> None:
    texts = ["der alte Mann ging langsam nach Hause .", "Der Mann ging heim.", "Ein Mann läuft ."]
    for source, answer in itertools.permutations(texts, 2):
        assert sari(source, answer, answer) == 1
        assert sari(source, source, answer) < 0.6


def test_the_source_of_a_simplification_is_the_paragraph_of_the_prompt() -> None:
    prompt = "Simplify this.\n\nParagraph:\nSome text.\n\nSimplification:"
    assert simplified_paragraph(prompt) == "Some text."
    assert simplified_paragraph("Some text.") == "Some text."
    found = score("sari", ["Some text."], ["A text."], [prompt])
    assert found == sari("Some text.", "Some text.", "A text.")


def test_a_score_is_the_mean_over_samples() -> None:
    assert score("number", ["1", "2", "x"], ["1", "3", "4"], [""] * 3) == pytest.approx(1 / 3)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="rouge"):
        score("rouge", ["a"], ["a"], ["a"])
    with pytest.raises(MismatchError, match="1 predictions for 2 answers"):
        score("number", ["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(DataError):
        score("number", [], [], [])
