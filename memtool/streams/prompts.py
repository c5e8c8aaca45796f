"""Prompts: what a text tower reads about a class, made from the template of its data set."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.streams.task import Stream
from memtool_stores.printable import shown

DEFAULT_TEMPLATE = "a photo of a {}."
"""The template of a task that has none of its own."""


def prompts(stream: Stream) -> tuple[str, ...]:
    """One prompt for every class of the stream, by the template of the first task that has it.

    Underscores in a class name become spaces. A name that two data sets share is qualified by the
    data set (`Forest (eurosat)`) and stays so in the prompt: no two prompts are equal.
    """
    template: dict[int, str] = {}
    for task in stream.tasks:
        for label in task.classes:
            template.setdefault(label, task.prompt or DEFAULT_TEMPLATE)
    return tuple(
        prompt(template.get(label, DEFAULT_TEMPLATE), name)
        for label, name in enumerate(stream.class_names)
    )


def prompt(template: str, class_name: str) -> str:
    """`"a photo of a {}."` and `"yin_yang"` give `"a photo of a yin yang."`."""
    return template.replace("{}", " ".join(class_name.replace("_", " ").split()))


def check_template(template: str, where: str) -> None:
    """Raise ConfigError, beginning with `where`, unless the template has one place for the name."""
    if template.count("{}") != 1:
        raise ConfigError(
            f"{where} is {shown(template)}", expected="text with one {} for the class"
        )
