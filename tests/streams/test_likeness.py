"""Tasks made alike: what the last task of a stream has of the first."""

from __future__ import annotations

import numpy as np
import pytest

from memtool.errors import ConfigError
from memtool.settings import StreamSettings
from memtool.streams import create_stream
from memtool.streams.task import Stream

SIZES = {"train_per_task": 40, "test_per_task": 20}


def stream(**settings: object) -> Stream:
    return create_stream(StreamSettings.model_validate({**SIZES, **settings}), 32)


def same(one: object, other: object) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)  # type: ignore[attr-defined]


def test_none_is_the_stream_as_it_is_and_all_is_the_first_task_image_by_image() -> None:
    plain, whole = stream(), stream(alike=1)
    assert stream(alike=0, alike_by="others").fingerprint == plain.fingerprint
    first, last = whole.tasks[0], whole.tasks[-1]
    for part in ("train", "validation", "test"):
        assert same(getattr(first, part), getattr(last, part))
        assert same(getattr(first, part), getattr(plain.tasks[0], part))
    assert last.classes == first.classes
    assert [task.name for task in whole.tasks] == [task.name for task in plain.tasks]
    assert whole.fingerprint != plain.fingerprint


def test_a_share_gives_way_to_the_same_share_of_the_first() -> None:
    plain, half = stream(), stream(alike=0.25)
    first, own, last = plain.tasks[0].train, plain.tasks[-1].train, half.tasks[-1].train
    rows = {image.tobytes() for image in last.images}
    assert len(last) == 40
    assert sum(image.tobytes() in rows for image in own.images) == 30
    assert sum(image.tobytes() in rows for image in first.images) == 10
    assert same(half.tasks[0].train, first)


def test_a_task_is_revisited_by_images_that_it_was_not_learned_from() -> None:
    plain, again = stream(), stream(alike=1, alike_by="others")
    first, last = again.tasks[0], again.tasks[-1]
    seen = {image.tobytes() for image in first.train.images}
    assert not any(image.tobytes() in seen for image in last.train.images)
    assert len(first.train) + len(last.train) == len(plain.tasks[0].train)
    assert same(first.test, last.test)
    assert set(first.train.labels) == set(last.train.labels) == set(range(10))


def test_looks_are_blended_with_an_image_of_the_same_class() -> None:
    plain, half, whole = (
        stream(),
        stream(alike=0.5, alike_by="looks"),
        stream(alike=1, alike_by="looks"),
    )
    own, blend, there = plain.tasks[-1].train, half.tasks[-1].train, whole.tasks[-1].train
    assert np.array_equal(own.labels, blend.labels)
    firsts = {
        (int(label), image.tobytes())
        for image, label in zip(
            plain.tasks[0].train.images, plain.tasks[0].train.labels, strict=True
        )
    }
    for image, label in zip(there.images, there.labels, strict=True):
        assert (int(label), image.tobytes()) in firsts
    middle = (own.images.astype(float) + there.images.astype(float)) / 2
    assert np.abs(blend.images - middle).max() <= 0.5


def test_of_classes_a_task_has_its_own_and_those_of_the_first() -> None:
    plain, half, whole = (stream(setting="cil", alike=share) for share in (0, 0.5, 1))
    first, own = plain.tasks[0].classes, plain.tasks[-1].classes
    assert half.tasks[-1].classes == own + first
    assert whole.tasks[-1].classes == first


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"setting": "dg"}, "stream.setting dg"),
        ({"setting": "cil", "alike_by": "looks"}, "by looks"),
        ({"order": ("upright",)}, "one task, upright"),
        ({"setting": "trace", "source": "nowhere"}, "stream.setting trace"),
    ],
)
def test_what_cannot_be_made_alike_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        stream(alike=0.5, **settings)
