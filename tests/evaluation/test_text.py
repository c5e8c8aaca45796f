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
from memtool.evaluation.text_trace import trace_choice, trace_code, trace_number, trace_sari


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


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("A", "A", 1),
        ("The answer is B.", "B", 1),
        ("(c) neutral", "C", 1),
        ("a dovish view: B", "B", 0),  # the article is a letter that stands alone
        ("选C。", "C", 1),  # none stands alone: the first one in a word
        ("bad", "B", 1),
        ("yes, of course", "yes", 0),  # the c of "course"
        ("none", "A", 0),
        ("D", "A", 0),
        ("", "A", 0),
    ],
)
def test_trace_choice_as_the_code_of_the_benchmark_gives_it(
    prediction: str, answer: str, right: float
) -> None:
    """What `postprocess_predictions` and `caculate_accuracy` of MoRAM's TRACE gave."""
    assert trace_choice(prediction, answer) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("17.480 km", "17.48", 1),
        ("It is 3, so 4", "4", 1),
        ("It is 4, not 3", "4", 0),
        ("4 in all", "4", 1),
        ("-3", "3", 0),
        ("1,680", "1680", 0),  # the last number is 680
        ("1680", "1,680", 1),
        ("50%", "0.5", 1),
        ("100", "1", 1),
        ("12.0001", "12", 1),
        ("12.01", "12", 0),
        (r"\boxed{7} of 9", "7", 1),
        ("boxed 6$", "6", 1),
        ("august ", "August", 1),
        ("in August", "August", 0),
        ("4.", "4", 1),
        ("$5", "5", 1),
        ("x = 7", "7", 1),
        ("10", "10.", 1),
        (".5", "0.5", 0),
        ("3e2", "300", 0),
        ("1 000", "1000", 0),
        ("no idea", "4", 0),
        ("", "4", 0),
    ],
)
def test_trace_number_as_the_code_of_the_benchmark_gives_it(
    prediction: str, answer: str, right: float
) -> None:
    """What `calculate_math_accuracy` of MoRAM's TRACE gave, without sympy."""
    assert trace_number(prediction, answer) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "percent"),
    [
        ("return <NUM_LIT:200> )", "return 200 )", 100),
        ("name = '<STR_LIT>' ,", "name = '' ,", 100),
        ("x = '<STR_LIT:a.b>' + <NUM_LIT>", "x = 'a.b' + 0", 100),
        ("for i in range ( <NUM_LIT:10> ) :", "for j in range ( <NUM_LIT:2> ) :", 89),
        ("return True", "return False", 70),
        ("<STR_LIT:<NUM_LIT:3>>", "3>", 31),
        ("a\nb", "a b", 67),
        ("", "x", 0),
        ("<STR_LIT>", "x", 0),
    ],
)
def test_trace_code_as_the_code_of_the_benchmark_gives_it(
    prediction: str, answer: str, percent: int
) -> None:
    """What `postprocess` of TRACE and fuzzywuzzy, with python-Levenshtein, gave."""
    assert trace_code(prediction, answer) == pytest.approx(percent / 100)


PROMPT = "Provide a simplified version.\n\nParagraph:\n{}\n\nSimplification:"


@pytest.mark.parametrize(
    ("prompt", "prediction", "answer", "expected"),
    [
        (
            "About 95 species are currently accepted .",
            "About 95 you now get in .",
            "About 95 species are currently known .",
            0.21805555555555556,
        ),
        (
            PROMPT.format("Der alte Mann ging langsam, 1.5 km, nach Hause."),
            "Der Mann ging nach Hause.",
            "Ein alter Mann lief heim.",
            0.4519230769230769,
        ),
        ("a b c", "a", "a x", 0.8333333333333334),
        ("a a a b", "a b", "a a", 0.75),
        ("x", "", "y", 0.9166666666666666),
        (
            "It's 3-4 o'clock (\"now\").",
            "it's 3-4 now",
            "It's now 3 or 4.",
            0.3833333333333333,
        ),
        (
            "Fish &amp; chips cost $5.50, not 5.",
            "Fish & chips: 5.50",
            "fish and chips cost 5.50 .",
            0.4325396825396825,
        ),
        ("a,.5 1..2 U.S.A.", "a 1.2 U.S.", "u.s.a. .5", 0.46296296296296297),
    ],
)
def test_trace_sari_as_the_code_of_the_benchmark_gives_it(
    prompt: str, prediction: str, answer: str, expected: float
) -> None:
    """What the metric `sari` of huggingface/evaluate gave, with the words of sacrebleu 2."""
    assert trace_sari(prompt, prediction, answer) == pytest.approx(expected, abs=1e-15)
    assert score("trace-sari", [prediction], [answer], [prompt]) == pytest.approx(expected)


def slow_trace_sari(source: str, prediction: str, answer: str) -> float:
    """With lists and exact fractions, for texts whose words are letters."""
    parts = []
    for n in range(1, 5):
        i, o, r = (
            [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
            for words in (text.split() or [""] for text in (source, prediction, answer))
        )
        kept = {g: min(i.count(g), o.count(g)) for g in {*i} & {*o}}
        to_keep = sum(min(i.count(g), r.count(g)) for g in {*i})
        right = {g: min(count, r.count(g)) for g, count in kept.items()}
        gone = {g: i.count(g) - o.count(g) for g in {*i} if i.count(g) > o.count(g)}
        rightly = {g: max(count - r.count(g), 0) for g, count in gone.items()}

        def mean(part: dict[tuple[str, ...], int], of: dict[tuple[str, ...], int]) -> Fraction:
            shares = [Fraction(part[g], of[g]) for g in of]
            return sum(shares, Fraction(0)) / len(shares) if shares else Fraction(1)

        def f(p: Fraction, q: Fraction) -> Fraction:
            return 2 * p * q / (p + q) if p + q else Fraction(0)

        new, wanted = {*o} - {*i}, {*r} - {*i}
        both = len(new & wanted)
        add = f(
            Fraction(both, len(new)) if new else Fraction(1),
            Fraction(both, len(wanted)) if wanted else Fraction(1),
        )
        recall = Fraction(sum(right.values()), to_keep) if to_keep else Fraction(1)
        parts += [add, f(mean(right, kept), recall), mean(rightly, gone)]
    return float(sum(parts, Fraction(0)) / 12)


def test_trace_sari_equals_the_oracle_on_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(200):
        texts = [" ".join(draw.choices("abcd", k=draw.randrange(9))) for _ in range(3)]
        assert trace_sari(*texts) == pytest.approx(slow_trace_sari(*texts), abs=1e-12)


def test_a_score_is_the_mean_over_samples() -> None:
    assert score("number", ["1", "2", "x"], ["1", "3", "4"], [""] * 3) == pytest.approx(1 / 3)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="rouge"):
        score("rouge", ["a"], ["a"], ["a"])
    with pytest.raises(MismatchError, match="1 predictions for 2 answers"):
        score("number", ["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(DataError):
        score("number", [], [], [])
