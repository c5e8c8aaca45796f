"""The studies by their words."""

from __future__ import annotations

from memtool.errors import ConfigError, did_you_mean
from memtool.experiments.studies.capacity import Capacity
from memtool.experiments.studies.interference import Interference
from memtool.experiments.studies.similarity import Similarity
from memtool.experiments.studies.study import Study

STUDIES: dict[str, Study] = {one.name: one for one in (Capacity(), Similarity(), Interference())}


def study_of(name: str) -> Study:
    """The study of a word. Raises ConfigError for another."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}", expected=did_you_mean(name, STUDIES))
    return STUDIES[name]
