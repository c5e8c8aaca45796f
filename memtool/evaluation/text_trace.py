"""The scorers of TRACE as the code of the benchmark has them, to stand beside published figures.

    trace-choice   the first A, B or C that stands alone, in either case; else the first in a word
    trace-number   what is boxed, else the last number; within 0.01 %, and 50 for 0.5 or 5000
    trace-code     marks of literals taken out, then edit similarity in whole percent
    trace-sari     SARI of the whole prompt, with the words of BLEU (13a)

The code is the one that MoRAM's authors run: github.com/Artificer-AI-Lab/MoRAM, after
github.com/BeyonderXX/TRACE. Ours, of the same names without `trace-` or nearly, are in `text`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from memtool.evaluation.text_grams import GRAMS, f_measure, grams, share

_ALONE = re.compile(r"\b([ABC])\b", re.IGNORECASE)
_NUMBERS = re.compile(r"-?\d+\.?\d*")
_UNITS = re.compile(r"\\?[$%]|[\s'\"]")
_NAME = re.compile(r"^[^=]{0,2}=(?=[^=]*$)")
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_BARE = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_MARKS = re.compile("([" + re.escape("".join({*string.punctuation} - {*"',-."})) + "])")
CLOSE = 1e-4
"""Two numbers that differ by this share of the larger one are the same."""


def trace_choice(prediction: str, answer: str) -> float:
    """1 when the letter that is found in an answer is the right one.

    A word of one letter counts as one: "a dovish view: B" says A. An answer without any of the
    letters is compared as it is, as far as the right one goes; an empty one is wrong.
    """
    text = prediction.strip()
    alone = _ALONE.search(text)
    letter = alone[1] if alone else next((one for one in text if one.upper() in "ABC"), "")
    said = (letter.upper() or text)[: len(answer)]
    return float(bool(said) and said == answer)


def trace_number(prediction: str, answer: str) -> float:
    r"""1 when the number in `\boxed{}`, else the last one, is the right one, its % or its hundred.

    A comma ends a number of an answer, and a number begins with a digit: "1,680" says 680. An
    answer without a number has to be the right one but for case. LaTeX beyond `\boxed` that the
    code also reads (fractions, roots) is not read here; no answer of TRACE has any.
    """
    said, right = _said(prediction.strip()), _plain(answer.strip())
    if said.casefold() == right.casefold():
        return 1.0
    one, other = _value(said), _value(right)
    if one is None or other is None:
        return 0.0
    meant = (other / 100, other, other * 100)
    return float(any(math.isclose(one, value, rel_tol=CLOSE) for value in meant))


def trace_code(prediction: str, answer: str) -> float:
    """Edit similarity of two pieces of code without the marks of literals, in whole percent.

    `<NUM_LIT>` is 0, `<STR_LIT>` and `<CHAR_LIT>` are nothing, and `<STR_LIT:x>` is x. Nothing
    left of either is 0.
    """
    from memtool.evaluation.text import edit_similarity

    said, right = without_literals(prediction), without_literals(answer)
    if not said or not right:
        return 0.0
    return round(100 * edit_similarity(said, right)) / 100


def without_literals(code: str) -> str:
    """Code with the values of its literals in the place of their marks."""
    for mark, value in _BARE.items():
        code = code.replace(mark, value)
    return _LITERAL.sub(lambda found: found[1], code)


def trace_sari(prompt: str, prediction: str, answer: str) -> float:
    """SARI against one reference, with all of the prompt as the source.

    For runs of n = 1 … 4 words: F of what was added, F of what was kept, and precision of what was
    deleted, each averaged over n, then over the three. Precision of keeping and of deleting is a
    mean over kinds of runs of the right share of each. 0/0 is 1.
    """
    source, said, wanted = (_words(text) for text in (prompt, prediction, answer))
    parts = [_of_length(n, source, said, wanted) for n in range(1, GRAMS + 1)]
    return fmean(fmean(part) for part in zip(*parts, strict=True))


def _of_length(
    n: int, source: Sequence[str], said: Sequence[str], wanted: Sequence[str]
) -> tuple[float, float, float]:
    before, after, right = grams(source, n), grams(said, n), grams(wanted, n)
    added, to_add = set(after) - set(before), set(right) - set(before)
    both = len(added & to_add)
    add = f_measure(share(both, len(added)), share(both, len(to_add)))
    kept, to_keep = before & after, before & right
    rightly = kept & right
    keep = f_measure(_by_kind(rightly, kept), share(rightly.total(), to_keep.total()))
    gone = before - after
    return add, keep, _by_kind(gone - right, gone)


def _by_kind(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    """The mean over kinds of runs of the share of each; 1 for none."""
    return fmean(part[run] / count for run, count in whole.items()) if whole else 1.0


def _words(text: str) -> list[str]:
    """The words of mteval-v13a, in small letters: marks apart, points and commas unless in numbers.

    A dash is apart after a digit. No text is one empty word.
    """
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for written, meant in _ENTITIES.items():
        text = text.replace(written, meant)
    text = _MARKS.sub(r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split() or [""]


def _said(text: str) -> str:
    """What an answer says: what is boxed last, else its last number, else all of it."""
    _, box, tail = text.rpartition("boxed")
    if box and (inside := _plain(_in_braces(tail) if tail.startswith("{") else _to_dollar(tail))):
        return inside
    numbers = _NUMBERS.findall(text)
    return numbers[-1] if numbers else text


def _in_braces(text: str) -> str:
    """What is between the brace that a text begins with and its match, or the end."""
    depth = 0
    for place, one in enumerate(text):
        depth += {"{": 1, "}": -1}.get(one, 0)
        if not depth:
            return text[1:place]
    return text[1:]


def _to_dollar(text: str) -> str:
    return text.partition("$")[0].strip()


def _plain(text: str) -> str:
    """Without points at the end, signs of units, white space, quotes and `x =`."""
    return _NAME.sub("", _UNITS.sub("", text.rstrip(".")))


def _value(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
