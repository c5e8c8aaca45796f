"""How answers in text are scored: one metric a task, each a fraction 0..1.

    first-character  share of answers whose first visible character is right (choices A, B, C, …)
    number           share of answers whose first number is the right one
    exact-match      share of answers that are right but for case and white space
    rouge-l          mean F-measure of the longest common subsequence of words (rouge-score)
    edit-similarity  mean 1 − indel distance / length of both, characters (rapidfuzz)
    sari             mean over samples of what was added, kept and deleted rightly (`sari`)

Those whose names begin with `trace-` are the benchmark's own, in `text_trace`. ROUGE-L and edit
similarity need the extra `llm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from memtool.errors import ConfigError, DataError, MismatchError, did_you_mean
from memtool.evaluation.right import Share
from memtool.evaluation.text_grams import GRAMS, f_measure, grams, share
from memtool.evaluation.text_trace import trace_choice, trace_code, trace_number, trace_sari

_NUMBER = re.compile(r"[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"\w+|[^\w\s]")


def score(
    metric: str, predictions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]
) -> float:
    """The metric of predictions against the right answers; both SARI look at the prompts, too.

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
    if metric in OF_PROMPTS:
        three = zip(prompts, predictions, answers, strict=True)
        return _mean([OF_PROMPTS[metric](*sample) for sample in three])
    if metric not in TEXT_METRICS:
        raise ConfigError(
            f"unknown metric of texts {metric!r}",
            expected=did_you_mean(metric, [*TEXT_METRICS, *OF_PROMPTS]),
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
        before, after, wanted = (grams(text, n) for text in words)
        added, to_add = set(after) - set(before), set(wanted) - set(before)
        add_p += share(len(added & to_add), len(added))
        add_r += share(len(added & to_add), len(to_add))
        kept, to_keep = before & after, before & wanted
        keep_p += share((kept & to_keep).total(), kept.total())
        keep_r += share((kept & to_keep).total(), to_keep.total())
        deleted, to_delete = before - after, before - wanted
        delete_p += share((deleted & to_delete).total(), deleted.total())
    add = f_measure(add_p / GRAMS, add_r / GRAMS)
    keep = f_measure(keep_p / GRAMS, keep_r / GRAMS)
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
    "trace-choice": trace_choice,
    "trace-number": trace_number,
    "trace-code": trace_code,
}
"""Metrics of a prediction and the right answer, by name."""

OF_PROMPTS: dict[str, Callable[[str, str, str], float]] = {
    "sari": lambda prompt, said, right: sari(simplified_paragraph(prompt), said, right),
    "trace-sari": trace_sari,
}
"""Metrics of a prompt, a prediction and the right answer, by name."""

RIGHT_OR_WRONG = ("first-character", "number", "exact-match", "trace-choice", "trace-number")
"""Those that are 1 or 0 for every sample."""


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"this metric needs {package}, which is not installed", remedy="pip install 'memtool[llm]'"
    )
