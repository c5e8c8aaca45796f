"""What do later tasks do to earlier ones? Keys and weights of old inputs after every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from pydantic import JsonValue

from memtool.errors import ConfigError, did_you_mean
from memtool.evaluation.record import Record
from memtool.evaluation.study import Measure
from memtool.experiments.ablations import ABLATIONS
from memtool.experiments.studies.study import Found, Study, Variant
from memtool.methods.retrospect import LooksBack
from memtool.settings import Config
from memtool.streams.task import Task

CONFIGURED = "configured"


class Interference(Study):
    """A line for every kind of memory, a point of it after every task.

    Which kinds there are beside the one configured are those of the ablations of keys and of their
    protection.
    """

    name = "interference"
    question = "What do later tasks do to the keys and the weights of earlier inputs?"
    axis = "tasks learned"
    settings = ("dil", "cil", "xtail")
    points = (CONFIGURED,)
    moments = True
    measures = (
        Measure(
            id="accuracy",
            label="accuracy on the tasks so far",
            unit="share",
            better="higher",
            about="Mean over the tasks learned by then.",
        ),
        Measure(
            id="old_accuracy",
            label="accuracy on old tasks",
            unit="share",
            better="higher",
            about="Mean over the tasks before the newest.",
        ),
        Measure(
            id="key_degrees",
            label="keys turned by",
            unit="degrees",
            better="lower",
            about="Mean angle between the keys of old tasks now and just after each was learned.",
        ),
        Measure(
            id="coefficient_drift",
            label="drift of old weights",
            unit="ratio",
            better="lower",
            about="Relative change of the weights that old inputs give the adapters that were "
            "there when their task was learned; mean over the old tasks.",
        ),
        Measure(
            id="new_coefficients",
            label="weights on newer adapters",
            unit="ratio",
            better="lower",
            about="Length of the weights that old inputs give adapters that came after their "
            "task, over that of their own then; mean over the old tasks.",
        ),
        Measure(
            id="new_share",
            label="share of the weight on newer adapters",
            unit="share",
            better="lower",
            about="The part of all weight that old inputs give to adapters that came after their "
            "task; mean over the old tasks.",
        ),
    )

    def variants(self, config: Config, words: Sequence[str]) -> list[Variant]:
        """The memory as configured, and kinds of keys and of protection by their words."""
        known: dict[str, Mapping[str, Any]] = {CONFIGURED: {}}
        for name in ("keys", "protect"):
            known |= ABLATIONS[name].variants(config)
        for word in words:
            if word not in known:
                raise ConfigError(
                    f"study interference of {word!r}", expected=did_you_mean(word, known)
                )
        return [Variant(word, known[word]) for word in words]

    def look(self, method: LooksBack, tasks: Sequence[Task]) -> dict[str, JsonValue]:
        """All moments of a memory."""
        return {"moments": [asdict(one) for one in method.look_back(tasks)]}

    def passes(self, tests: Sequence[int]) -> int:
        """Those of every task, after it and after each later one."""
        return sum(count * (len(tests) - place) for place, count in enumerate(tests))

    def found(self, record: Record, looked: Mapping[str, Any]) -> list[Found]:
        """What was seen after every task; before the second there is nothing old."""
        names, points = record.run.task_names, []
        for one in looked["moments"]:
            old, count = one["old"], one["learned"]
            accuracies = [task["accuracy"] for task in old]
            by_task = {
                id: [task[id] for task in old]
                for id in ("key_degrees", "coefficient_drift", "new_coefficients", "new_share")
            }
            values = {"accuracy": fmean([*accuracies, one["newest"]])}
            if old:
                values["old_accuracy"] = fmean(accuracies)
            for id, each in by_task.items():
                if known := [value for value in each if value is not None]:
                    values[id] = sum(known) / len(known)
            by_task = {"accuracy": [*accuracies, one["newest"]], **(by_task if old else {})}
            points.append(Found(values, by_task, f"{count} {names[count - 1]}", float(count)))
        return points
