"""A prediction as a person reads it: the class, and whether the input is like what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool_cli.output import Table, percent

if TYPE_CHECKING:
    from memtool.methods.results import Prediction
    from memtool_cli.output import Out


def predicted(
    prediction: Prediction | None, answer: str | None = None, novelty: float | None = None
) -> list[Table]:
    """What was predicted, as the table that stands first: a class, or an answer to a prompt.

    With the novelty of a prompt, where it is known.
    """
    rows: list[tuple[str, ...]] = []
    if prediction is not None:
        rows.append(("prediction", prediction.label, percent(prediction.probability)))
    if answer is not None:
        rows.append(("answer", answer))
    if novelty is not None:
        rows.append(("novelty", f"{novelty:.2f}"))
    return [Table((), rows)] if rows else []


def say_unlike(out: Out, prediction: Prediction | None) -> None:
    """Say how little a prediction means where it means little."""
    if prediction is not None and prediction.unlike:
        out.note(unlike(prediction.novelty))


def unlike(novelty: float | None, what: str = "images") -> str:
    """The sentence on an input that is like nothing that was learned from images or prompts."""
    return (
        f"this is unlike all that the memory learned (novelty {novelty:.2f}; 99 of 100 {what} that "
        "it learned from are below 1): what it says means little"
    )
