"""What one subject recalls: the images of a task, one image, or a query that somebody made."""

from __future__ import annotations

from pathlib import Path

from memtool.evaluation.metrics import mean_share
from memtool.methods.mira.measure import Measure, seen_by
from memtool.methods.mira.recalled import coefficients_for, recalled_adapter, require_whole
from memtool.methods.mira.state import Snapshot
from memtool.methods.outcome import predicted, share_right
from memtool.methods.records import task_of
from memtool.methods.results import AdapterCoefficient, RetrieveResult
from memtool.methods.subject import read_query, subject_of
from memtool.workspace import Workspace


def retrieved(
    work: Workspace,
    snapshot: Snapshot,
    *,
    task: str | None,
    image: Path | None,
    query: Path | None,
    out: Path | None,
) -> RetrieveResult:
    """The mixture of one of task, image and query, written to a new folder `out` if there is one.

    Raises ConfigError for a memory that was never consolidated, NotFoundError for a task that is
    not in the stream, DataError for an image, MismatchError for a query that does not fit.
    """
    state, model, head = snapshot.consolidated()
    if out is not None:
        require_whole(state)
    accuracy, prediction, left = None, None, None
    if query is not None:
        words, samples = str(query), 1
        coefficients = coefficients_for(model, read_query(query, work.backbone), query)
    else:
        subject = subject_of(work, task=task, image=image)
        images = subject.images
        words, samples = subject.words, len(subject)
        measure = Measure(work)
        logits, recalled = measure.recall(model, head, images.images)
        left = measure.left_out(model, images.images)
        coefficients = recalled.mean(dim=0)
        if subject.task is not None:
            accuracy = share_right(logits, images)
        else:
            far = seen_by(work.engine, snapshot, images.images[0])
            prediction = predicted(head.probabilities(logits)[0], state.class_names, far)
    if out is not None:
        recalled_adapter(out, work, snapshot, coefficients)
    mean = coefficients.mean(dim=0)
    return RetrieveResult(
        version=snapshot.version,
        subject=words,
        samples=samples,
        mix=state.memory.mix,
        separation=state.memory.separation,
        adapters=tuple(
            AdapterCoefficient(name=r.name, task=task_of(r), coefficient=float(a))
            for r, a in zip(snapshot.records, mean, strict=True)
        ),
        blocks=tuple(tuple(float(a) for a in row) for row in coefficients),
        block_numbers=model.memory.blocks,
        prediction=prediction,
        accuracy=accuracy,
        left_out=None if left is None else mean_share(left.numpy()),
        out=out,
    )
