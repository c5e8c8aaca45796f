"""How many adapters should a task have? J of them, in one pass of training, share its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memtool.config import whole_numbers
from memtool.errors import ConfigError
from memtool.evaluation.record import Record
from memtool.evaluation.study import Measure
from memtool.experiments.studies.study import Found, Study, Variant
from memtool.settings import Config


class Capacity(Study):
    """One run for every J; the first, with J = 1, is the plain run."""

    name = "capacity"
    question = "What do more adapters a task bring, and what do they cost?"
    axis = "adapters a task (J)"
    settings = ("dil", "cil", "xtail")
    points = ("1", "2", "5", "10", "25", "50")
    measures = (
        Measure(
            id="accuracy",
            label="accuracy at the end",
            unit="share",
            better="higher",
            about="Mean over all tasks after the last one, the task inferred.",
        ),
        Measure(
            id="oracle",
            label="accuracy, task known",
            unit="share",
            better="higher",
            about="The same with the adapters of the true task in equal parts.",
        ),
        Measure(
            id="right_choice",
            label="right choice of task",
            unit="share",
            better="higher",
            about="Test images whose true task has most of the weight.",
        ),
        Measure(
            id="ms_per_image",
            label="time of an image",
            unit="ms",
            better="lower",
            about="Inference with all adapters in memory, in batches; on this machine.",
        ),
        Measure(
            id="bytes",
            label="kept beside the model",
            unit="bytes",
            better="lower",
            about="Adapters and keys, in float32.",
        ),
        Measure(
            id="seconds",
            label="time to learn",
            unit="s",
            better="lower",
            about="Training and consolidation of all tasks; on this machine.",
        ),
    )

    def variants(self, config: Config, words: Sequence[str]) -> list[Variant]:
        """A point for every number of adapters; `1..3` are three."""
        del config
        found = []
        for word in whole_numbers(",".join(words), "--points"):
            text = str(word)
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(
                    f"study capacity with {text!r} adapters a task",
                    expected="whole numbers from 1 on",
                    remedy="--points 1,2,5",
                )
            count = int(text)
            found.append(Variant(str(count), {"adapter.per_task": count}, float(count)))
        return found

    def found(self, record: Record, looked: Mapping[str, Any]) -> list[Found]:
        """From the record alone."""
        del looked
        row = record.row("memory")
        oracle = next((one for one in record.metrics.rows if one.id == "oracle"), None)
        values = {
            "accuracy": row.metrics.get("faa"),
            "oracle": None if oracle is None else oracle.metrics.get("faa"),
            "right_choice": row.metrics.get("task_accuracy"),
            "ms_per_image": row.ms_per_input,
            "bytes": row.bytes,
            "seconds": row.seconds,
        }
        return [Found({id: value for id, value in values.items() if value is not None})]
