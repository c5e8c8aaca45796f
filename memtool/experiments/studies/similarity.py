"""What if two tasks are alike? The last task becomes the first one, step by step.

How is said where `stream.alike` is done: `memtool.streams.likeness`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue

from memtool.errors import ConfigError
from memtool.evaluation.record import Record
from memtool.evaluation.study import Measure
from memtool.experiments.studies.study import Found, Study, Variant
from memtool.methods.retrospect import LooksBack
from memtool.settings import Config
from memtool.streams.task import Task

WORDS: Mapping[str, Mapping[str, Any]] = {
    "duplicate": {"stream.alike": 1.0, "stream.alike_by": "copies"},
    "revisited": {"stream.alike": 1.0, "stream.alike_by": "others"},
}


class Similarity(Study):
    """One run for every step from two tasks to one that comes twice."""

    name = "similarity"
    question = "What does a memory do with tasks that are alike, and what does the oldest lose?"
    axis = "share of the last task that is the first one"
    settings = ("dil", "cil")
    points = ("0", "0.25", "0.5", "0.75", "1", "revisited")
    measures = (
        Measure(
            id="accuracy",
            label="accuracy at the end",
            unit="share",
            better="higher",
            about="Mean over all tasks after the last one.",
        ),
        Measure(
            id="oldest",
            label="accuracy on the oldest task",
            unit="share",
            better="higher",
            about="On the first task, after the last one.",
        ),
        Measure(
            id="oldest_lost",
            label="the oldest task lost",
            unit="points",
            better="lower",
            about="Accuracy on the first task just after it was learned, less that at the end.",
        ),
        Measure(
            id="last",
            label="accuracy on the last task",
            unit="share",
            better="higher",
            about="On the task that is made alike; its test images change with it.",
        ),
        Measure(
            id="right_choice",
            label="right choice of task",
            unit="share",
            better="higher",
            about="Test images of all tasks whose true task has most of the weight.",
        ),
        Measure(
            id="pair_choice",
            label="right choice between the two",
            unit="share",
            better="higher",
            about="Test images of the first and the last task that choose their own.",
        ),
        Measure(
            id="pair_either",
            label="one of the two chosen",
            unit="share",
            about="Test images of the first and the last task that choose either. Of a duplicate "
            "half of these are right by necessity: each image stands in both tasks.",
        ),
    )

    def variants(self, config: Config, words: Sequence[str]) -> list[Variant]:
        """Shares from 0 to 1, by `stream.alike_by`; "duplicate" and "revisited"."""
        found = []
        for word in words:
            if word in WORDS:
                found.append(Variant(word, WORDS[word]))
                continue
            try:
                share = float(word)
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise ConfigError(
                    f"study similarity at {word!r}",
                    expected=f"a share from 0 to 1, or {' or '.join(WORDS)}",
                )
            by = config.stream.alike_by if share else "copies"
            settings = {"stream.alike": share, "stream.alike_by": by}
            found.append(Variant(f"{share:g}", settings, share))
        return found

    def look(self, method: LooksBack, tasks: Sequence[Task]) -> dict[str, JsonValue]:
        """The choice between the first and the last task."""
        return dict(asdict(method.choices((tasks[0], tasks[-1]))))

    def passes(self, tests: Sequence[int]) -> int:
        """Those of the two tasks."""
        return tests[0] + tests[-1]

    def found(self, record: Record, looked: Mapping[str, Any]) -> list[Found]:
        """From the record, and the choice between the two."""
        row = record.row("memory")
        then, now = row.accuracy[1][0], row.accuracy[-1]
        values = {
            "accuracy": row.metrics.get("faa"),
            "oldest": now[0],
            "oldest_lost": None if then is None or now[0] is None else then - now[0],
            "last": now[-1],
            "right_choice": row.metrics.get("task_accuracy"),
            "pair_choice": looked["own"],
            "pair_either": looked["either"],
        }
        return [Found({id: value for id, value in values.items() if value is not None})]
