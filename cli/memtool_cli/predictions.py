"""A prediction as a person reads it: the class, and whether the input is like what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool_cli.output import percent

if TYPE_CHECKING:
    from memtool.methods.results import Prediction
    from memtool_cli.output import Out


def show_prediction(out: Out, prediction: Prediction | None) -> None:
    """Say on stderr what was predicted, and how little it means where it means little."""
    if prediction is None:
        return
    out.note(f"prediction: {prediction.label} ({percent(prediction.probability)})")
    if prediction.unlike:
        out.note(unlike(prediction.novelty))


def unlike(novelty: float | None) -> str:
    """The sentence on an input that is like nothing that was learned."""
    return (
        f"this is unlike all that the memory learned (novelty {novelty:.2f}; 99 of 100 images that "
        "it learned from are below 1): what it says means little"
    )
