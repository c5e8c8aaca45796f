"""How answers in text are scored: one metric a task, each a fraction 0..1.

    first-character  share of answers whose first visible character is right (choices A, B, C, …)
    number           share of answers whose first number is the right one
    exact-match      share of answers that are right but for case and white space
    rouge-l          mean F-measure of the longest common subsequence of words (rouge-score)
    edit-similarity  mean 1 − indel distance / length of both, characters (rapidfuzz)
    sari             mean over samples of what was added, kept and deleted rightly (`sari`)

ROUGE-L and edit similarity need the extra `llm`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from memtool.errors import ConfigError, DataError, MismatchError, did_you_mean
from memtool.evaluation.right import Share

GRAMS = 4
"""SARI looks at runs of 1 to so many words."""

_NUMBER = re.compile(r"[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"\w+|[^\w\s]")


def score(
    metric: str, predictions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]
) -> float:
    """The metric of predictions against the right answers; only SARI looks at the prompts.

    A `Share` for a metric that knows only right and wrong.

    Raises ConfigError for an unknown metric, or one whose library is not installed;
    MismatchError for lists of different lengths; DataError for none at all.
    """
    if not len(predictions) == len(answers) == len(prompts):
        raise MismatchError(
            f"{len(predictions)} predictions for {len(answers)} answers to {len(prompts)} prompts",
            expected="one of each for every sample",
        )
    if not answers:
        raise DataError("no answers to score", expected="at least one sample")
    if metric == "sari":
        sources = [simplified_paragraph(prompt) for prompt in prompts]
        return _mean([sari(*sample) for sample in zip(sources, predictions, answers, strict=True)])
    if metric not in TEXT_METRICS:
        raise ConfigError(
            f"unknown metric of texts {metric!r}",
            expected=did_you_mean(metric, [*TEXT_METRICS, "sari"]),
        )
    of_pair = TEXT_METRICS[metric]
    scores = [of_pair(said, right) for said, right in zip(predictions, answers, strict=True)]
    return Share(scores) if metric in RIGHT_OR_WRONG else _mean(scores)


def first_character(prediction: str, answer: str) -> float:
    """1 when the first visible characters are equal, else 0; an empty prediction is wrong."""
    return float(bool(prediction.strip()) and prediction.strip()[0] == answer.strip()[:1])


def number(prediction: str, answer: str) -> float:
    """1 when the first numbers are equal in value ("17.50" and "17.5", "1,000" and "1000").

    An answer without a number has to be matched as in `exact_match`.
    """
    right = first_number(answer)
    if right is None:
        return exact_match(prediction, answer)
    return float(first_number(prediction) == right)


def first_number(text: str) -> Decimal | None:
    """The first number of a text, thousands apart by commas or not; None without one that fits."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found[0].replace(",", "").replace("−", "-"))
    except InvalidOperation:  # an exponent that no number has
        return None


def exact_match(prediction: str, answer: str) -> float:
    """1 when both are the same but for case and white space, else 0."""
    return float(prediction.casefold().split() == answer.casefold().split())


def rouge_l(prediction: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words; rouge-score's own words, no stems."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    found = RougeScorer(["rougeL"]).score(answer, prediction)
    return float(found["rougeL"].fmeasure)


def edit_similarity(prediction: str, answer: str) -> float:
    """1 − (insertions + deletions) / (length of both), in characters."""
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise _missing("rapidfuzz") from error
    return float(fuzz.ratio(prediction, answer)) / 100


def sari(source: str, prediction: str, answer: str) -> float:
    """SARI of one simplification (Xu et al. 2016) against one reference.

    For runs of n = 1 … 4 words, with I, O and R those of source, prediction and reference:

        add     precision |(O − I) ∩ R| / |O − I|, recall over |R − I|    (kinds of runs)
        keep    precision |I ∩ O ∩ R| / |I ∩ O|, recall over |I ∩ R|         (runs counted)
        delete  precision |(I − O) ∩ (I − R)| / |I − O|                     (runs counted)

    Precision and recall are averaged over n, F is taken of the averages, and SARI is the mean of
    F_add, F_keep and the precision of deletion. 0/0 is 1: nothing was to be done and nothing was
    done. So what equals the reference scores 1. Words are compared without case.
    """
    words = [_WORD.findall(text.casefold()) for text in (source, prediction, answer)]
    add_p, add_r, keep_p, keep_r, delete_p = 0.0, 0.0, 0.0, 0.0, 0.0
    for n in range(1, GRAMS + 1):
        before, after, wanted = (_grams(text, n) for text in words)
        added, to_add = set(after) - set(before), set(wanted) - set(before)
        add_p += _share(len(added & to_add), len(added))
        add_r += _share(len(added & to_add), len(to_add))
        kept, to_keep = before & after, before & wanted
        keep_p += _share((kept & to_keep).total(), kept.total())
        keep_r += _share((kept & to_keep).total(), to_keep.total())
        deleted, to_delete = before - after, before - wanted
        delete_p += _share((deleted & to_delete).total(), deleted.total())
    add = _f_measure(add_p / GRAMS, add_r / GRAMS)
    keep = _f_measure(keep_p / GRAMS, keep_r / GRAMS)
    return (add + keep + delete_p / GRAMS) / 3


def simplified_paragraph(prompt: str) -> str:
    """What a prompt asks to simplify: what lies between `Paragraph:` and `Simplification:`.

    A prompt without these lines is all of it text to simplify.
    """
    head, found, tail = prompt.partition("Paragraph:\n")
    text = tail if found else head
    return text.removesuffix("Simplification:").strip()


TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "first-character": first_character,
    "number": number,
    "exact-match": exact_match,
    "rouge-l": rouge_l,
    "edit-similarity": edit_similarity,
}
"""Metrics of a prediction and the right answer, by name; SARI, of three texts, is beside them."""

RIGHT_OR_WRONG = ("first-character", "number", "exact-match")
"""Those that are 1 or 0 for every sample."""


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[place : place + n]) for place in range(len(words) - n + 1))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _f_measure(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"this metric needs {package}, which is not installed", remedy="pip install 'memtool[llm]'"
    )
