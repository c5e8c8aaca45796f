from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from memtool.settings import Setting, StreamSettings
from memtool.streams import create_stream, outline
from memtool.streams.digits import ANGLES, DOMAINS, digits_table, packaged

# sha256 of the training labels of all tasks, seed 0. A change means that every result on the
# digits so far was made from other splits.
GOLDEN = {
    "dil": "14cd6cf267173202dd363866d1f72c7625be04f2ca8c0b9e6587ef085156a2d8",
    "cil": "9ddbee795623876940f86e21b230a2abc043c298d632497282e1785b12f1b70e",
}


def test_dil_has_five_domains_of_600_and_1197() -> None:
    stream = create_stream(StreamSettings(), 32)
    assert [task.name for task in stream.tasks] == list(DOMAINS)
    assert [task.number for task in stream.tasks] == [1, 2, 3, 4, 5]
    for task in stream.tasks:
        assert task.domain == task.name
        assert task.classes == tuple(range(10))
        assert task.train.images.shape == (600, 32, 32, 3)
        assert task.test.images.shape == (1197, 32, 32, 3)
        assert task.train.images.dtype == np.uint8
        assert task.train.labels.dtype == np.int64
        assert len(task.validation) == 0
        assert np.bincount(task.train.labels).tolist() == [60] * 10


@pytest.mark.parametrize("setting", ["dil", "dg", "cil", "til", "mts"])
def test_an_outline_says_the_same_without_a_pixel(setting: Setting) -> None:
    settings = StreamSettings(setting=setting, train_per_task=50, validation=0.1, seed=3)
    drawn, said = create_stream(settings, 32), outline(settings, 32)
    for stream in (drawn, said):
        assert len(stream.tasks) > 1
    assert said.fingerprint == drawn.fingerprint
    assert (said.name, said.setting, said.class_names) == (
        drawn.name,
        drawn.setting,
        drawn.class_names,
    )
    for one, other in zip(said.tasks, drawn.tasks, strict=True):
        assert (one.number, one.name, one.domain, one.classes) == (
            other.number,
            other.name,
            other.domain,
            other.classes,
        )
        assert np.array_equal(one.train.labels, other.train.labels)
        assert one.train.images.size == 0


def test_dg_turns_the_digits() -> None:
    stream = create_stream(StreamSettings(setting="dg"), 32)
    assert [task.name for task in stream.tasks] == [f"rot{angle}" for angle in ANGLES]
    upright, quarter = stream.tasks[0].test.images, stream.tasks[3].test.images
    assert np.abs(np.rot90(upright, axes=(1, 2)).astype(int) - quarter).max() <= 1


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_cil_and_til_cut_five_pairs_of_classes(setting: Setting) -> None:
    stream = create_stream(StreamSettings(setting=setting), 32)
    assert len(stream.tasks) == 5
    assert sorted(itertools.chain(*(task.classes for task in stream.tasks))) == list(range(10))
    for task in stream.tasks:
        assert task.domain is None
        assert set(task.train.labels) == set(task.test.labels) == set(task.classes)
        assert len(task.train) == 120


@pytest.mark.parametrize("setting", ["dil", "cil"])
def test_the_split_never_changes(setting: Setting) -> None:
    stream = create_stream(StreamSettings(setting=setting), 32)
    labels = np.concatenate([task.train.labels for task in stream.tasks]).astype("<i8")
    assert hashlib.sha256(labels.tobytes()).hexdigest() == GOLDEN[setting]


@pytest.mark.parametrize("setting", ["dil", "dg"])
def test_the_same_seed_gives_the_same_images(setting: Setting) -> None:
    first, second, other = (digits_table(setting, seed, 32) for seed in (3, 3, 4))
    assert np.array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint
    assert not np.array_equal(first.labels, other.labels)
    assert first.fingerprint != other.fingerprint


def test_training_and_test_digits_are_apart() -> None:
    task = create_stream(StreamSettings(), 32).tasks[0]
    train = {image.tobytes() for image in task.train.images}
    assert len(train) == 600
    assert not any(image.tobytes() in train for image in task.test.images)


def test_domains_are_the_named_transformations() -> None:
    up, inverted, quarter, noisy, textured = (
        task.train.images.astype(int) for task in create_stream(StreamSettings(), 32).tasks
    )
    assert np.abs(inverted - (255 - up)).max() <= 1  # rounded the other way
    assert np.array_equal(quarter, np.rot90(up, axes=(1, 2)))
    assert np.array_equal(up[..., 0], up[..., 2])
    # Noise and texture hide the digit from one pixel, not from the mean over many images.
    turned = up[:, ::-1, ::-1].mean(-1)
    assert np.corrcoef(turned.ravel(), noisy.mean(-1).ravel())[0, 1] > 0.7
    mirrored = up[:, :, ::-1].mean(-1)
    assert np.corrcoef(mirrored.ravel(), textured.mean(-1).ravel())[0, 1] < -0.7
    assert (textured.std(-1) > 5).mean() > 0.5


def test_a_head_of_one_domain_fails_on_the_others() -> None:
    # On raw pixels already: what a domain asks for is not what the next one asks for.
    tasks = create_stream(StreamSettings(), 32).tasks
    train = [_flat(task.train.images) for task in tasks]
    test = [_flat(task.test.images) for task in tasks]
    answers = np.eye(10)[tasks[0].train.labels]
    accuracy = np.zeros((5, 5))
    for row, images in enumerate(train):
        gram = images.T @ images
        ridge = 1e-2 * np.trace(gram) / len(gram) * np.eye(len(gram))
        head = np.linalg.solve(gram + ridge, images.T @ answers)
        for column, queries in enumerate(test):
            guesses = (queries @ head).argmax(1)
            accuracy[row, column] = (guesses == tasks[0].test.labels).mean()
    assert accuracy.diagonal().min() > 0.75
    assert accuracy[~np.eye(5, dtype=bool)].mean() < 0.2


def test_the_domain_can_be_told_from_the_image() -> None:
    tasks = create_stream(StreamSettings(), 32).tasks
    train = np.concatenate([_statistics(task.train.images) for task in tasks])
    test = np.concatenate([_statistics(task.test.images) for task in tasks])
    numbers = np.repeat(np.arange(5), 1197)
    gram = train.T @ train + 1e-6 * len(train) * np.eye(train.shape[1])
    key = np.linalg.solve(gram, train.T @ np.eye(5)[np.repeat(np.arange(5), 600)])
    assert ((test @ key).argmax(1) == numbers).mean() > 0.95


def test_other_image_sizes_show_the_same_digits() -> None:
    small = digits_table("cil", 0, 32)
    large = digits_table("cil", 0, 96)
    assert large.images.shape == (1797, 96, 96, 3)
    assert large.fingerprint == small.fingerprint
    shrunk = large.images.reshape(-1, 32, 3, 32, 3, 3).mean((2, 4))
    assert np.abs(shrunk - small.images).mean() < 3


def _flat(images: np.ndarray) -> np.ndarray:
    pooled = images.reshape(len(images), 16, 2, 16, 2, 3).mean((2, 4, 5)) / 255
    return np.concatenate([pooled.reshape(len(images), -1), np.ones((len(images), 1))], 1)


def _statistics(images: np.ndarray) -> np.ndarray:
    """A coarse picture, its squares and the contrast of colours."""
    flat = _flat(images)
    colour = (images / 255).std(-1).mean((1, 2))[:, None]
    return np.concatenate([flat, flat[:, :-1] ** 2, colour, colour**2], 1)


def test_the_packaged_digits_are_those_of_scikit_learn() -> None:
    pixels, digits = load_digits(return_X_y=True)
    ours, labels = packaged()
    assert np.array_equal(ours, pixels)
    assert np.array_equal(labels, digits)
