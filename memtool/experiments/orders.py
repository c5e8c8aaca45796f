"""What a seed of a run changes beside initialisation and batches, and runs at the order bounds."""

from __future__ import annotations

import numpy as np

from memtool.errors import ConfigError
from memtool.methods import open_method
from memtool.settings import AT_ONCE, Config
from memtool.streams.bounds import (
    BoundedOrder,
    bounds,
    similarity_of_classes,
    similarity_of_domains,
)
from memtool.streams.ordering import random_ranks
from memtool.streams.task import Stream
from memtool.workspace import Workspace

_OF_CLASSES = ("cil", "til", "mts")


def of_seed(config: Config, seed: int) -> Config:
    """The configuration of one seed, with the order and the cut that `vary` gives it written out.

    Under "order" the names of the order are shuffled by the seed (of vil the tasks, whose groups of
    classes stay); under "all" the seed also draws which images are learned from and held back, and
    of vil the groups. The test images stay those of `stream.test_seed`,
    else of `stream.seed`. Raises ConfigError for an order of a setting that has none.
    """
    one = config.model_copy(update={"seed": (seed,), "vary": "start"})
    if config.vary == "start":
        return one
    stream = config.stream
    changes: dict[str, object] = {}
    if config.vary == "all":
        tested = stream.seed if stream.test_seed is None else stream.test_seed
        changes |= {"seed": seed, "test_seed": tested}
    if stream.setting not in AT_ONCE:
        names = _names(config, seed, changes if stream.setting == "vil" else {})
        ranks = random_ranks(len(names), "vary order", seed)
        changes["order"] = tuple(names[place] for place in np.argsort(ranks).tolist())
    elif config.vary == "order":
        raise _no_order("--vary order", stream.setting)
    return one.model_copy(update={"stream": stream.model_copy(update=changes)})


def at_bounds(config: Config) -> tuple[tuple[BoundedOrder, Config], ...]:
    """The hardest, median and easiest order of a stream of images, and the configuration of each.

    Raises ConfigError as `require_bounds`.
    """
    require_bounds(config)
    stream = config.stream
    work = open_method(config, seed=config.seed[0]).workspace
    names = _named(work.stream)
    found = []
    for bound in _bounds(work):
        order = tuple(names[place] for place in bound.order)
        changed = stream.model_copy(update={"order": order})
        found.append((bound, config.model_copy(update={"stream": changed, "orders": "given"})))
    return tuple(found)


def require_bounds(config: Config) -> None:
    """Raise ConfigError for texts, and for a setting whose orders no image may decide."""
    stream = config.stream
    if stream.setting in AT_ONCE:
        raise _no_order("--orders bounds", stream.setting)
    if stream.setting == "dgcl":
        raise ConfigError(
            "--orders bounds under stream.setting dgcl: an order by what images look like would "
            "look at those of the domain that is never seen",
            expected="orders that no image decides",
            remedy="--vary order, or --set stream.order=DOMAIN,DOMAIN,DOMAIN",
        )
    if stream.setting == "trace":
        raise ConfigError(
            "--orders bounds on a stream of texts",
            expected="images: the bounds go by class means of their features",
            remedy="--set stream.order=TASK,TASK,TASK, or --vary order",
        )


def _bounds(work: Workspace) -> tuple[BoundedOrder, ...]:
    tasks, seed = work.stream.tasks, work.config.stream.seed
    count = len(work.stream.class_names)
    means = np.full((len(tasks), count, work.backbone.dim), np.nan)
    for place, task in enumerate(work.telling("order bounds: class means", tasks)):
        features = work.features(task.train.images).double().numpy()
        for label in np.unique(task.train.labels).tolist():
            means[place, label] = features[task.train.labels == label].mean(axis=0)
    if work.stream.setting not in _OF_CLASSES:
        return bounds(similarity_of_domains(means), None, seed=seed)
    classes = [label for task in tasks for label in task.classes]
    of_classes = np.nanmean(means[:, classes], axis=0)
    widths = [len(task.classes) for task in tasks]
    return bounds(similarity_of_classes(of_classes), widths, seed=seed)


def _names(config: Config, seed: int, changes: dict[str, object]) -> list[str]:
    """As `_named`; of vil with the groups of classes that `changes` draw, of dgcl all domains."""
    stream = config.stream.model_copy(update={**changes, "held_out": None})
    changed = config.model_copy(update={"stream": stream})
    return _named(open_method(changed, seed=seed).workspace.stream)


def _named(stream: Stream) -> list[str]:
    """What `stream.order` names, in the order in force: classes, domains or tasks."""
    if stream.setting in _OF_CLASSES:
        return [stream.class_names[label] for task in stream.tasks for label in task.classes]
    return [task.name for task in stream.tasks]


def _no_order(option: str, setting: str) -> ConfigError:
    what = "sources" if setting == "dg" else "tasks"
    return ConfigError(
        f"{option} under stream.setting {setting}: all {what} are learned at once, in no order",
        expected="a setting whose tasks come one after another",
        remedy="--vary all, which draws other images for every seed",
    )
