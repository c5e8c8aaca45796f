"""Pre-training of nano on small parquet files: data, augmentation, descriptor, resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from safetensors import safe_open
from torch import Tensor

from memtool.backbones import create_backbone
from memtool.backbones.pretrain import (
    DESCRIPTOR_DIM,
    PretrainProgress,
    augment,
    describe,
    load_corpora,
    pretrain_nano,
)
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.errors import AlreadyExistsError, ConfigError, DataError, MismatchError, NotFoundError
from memtool.settings import BackboneSettings


def write(
    path: Path, count: int, size: int, classes: int, mode: str, column: str = "image"
) -> None:
    random = np.random.default_rng(size)
    images = [
        Pillow.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).convert(mode)
        for _ in range(count)
    ]
    features = Features({column: Image(), "label": ClassLabel(num_classes=classes)})
    labels = [i % classes for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({column: images, "label": labels}, features).to_parquet(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "omniglot" / "background.parquet", 12, 32, 4, "L")
    write(folder / "omniglot" / "evaluation.parquet", 9, 32, 3, "L")
    write(folder / "fashion_mnist" / "train.parquet", 8, 28, 2, "L")
    write(folder / "eurosat" / "train.parquet", 6, 64, 2, "RGB")
    return folder


class Killed(Exception):
    """Raised inside a run, as an interrupt would be."""


def test_corpora(data: Path) -> None:
    omniglot, fashion, eurosat = load_corpora(data)
    assert omniglot.images.shape == (21, 1, 32, 32)
    assert omniglot.labels.unique().tolist() == list(range(7))
    assert [c.classes for c in (omniglot, fashion, eurosat)] == [7, 2, 2]
    assert [c.per_batch for c in (omniglot, fashion, eurosat)] == [80, 32, 16]
    assert fashion.images.shape == (8, 1, 32, 32)
    assert eurosat.images.shape == (6, 3, 32, 32)
    assert all(c.images.dtype == torch.uint8 for c in (omniglot, fashion, eurosat))


def test_killed_runs_go_on_as_if_never_stopped(data: Path, tmp_path: Path) -> None:
    seen: list[PretrainProgress] = []
    whole = pretrain_nano(data, tmp_path / "whole.safetensors", steps=5, progress=seen.append)
    assert [p.step for p in seen] == [1, 2, 3, 4, 5]
    assert seen[-1] == whole.last
    assert whole.parameters == 1_271_200

    def kill(progress: PretrainProgress) -> None:
        if progress.step == 3:
            raise Killed

    cut = tmp_path / "cut.safetensors"
    with pytest.raises(Killed):
        pretrain_nano(data, cut, steps=5, checkpoint_steps=2, progress=kill)
    assert not cut.exists()
    resumed: list[PretrainProgress] = []
    report = pretrain_nano(data, cut, steps=5, progress=resumed.append)
    assert [p.step for p in resumed] == [3, 4, 5]
    assert report.sha256 == whole.sha256
    assert cut.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]

    backbone = create_backbone(BackboneSettings(weights=cut))
    assert backbone.features(torch.zeros(1, 3, 32, 32)).shape == (1, 160)
    with safe_open(cut, "pt") as file:
        made = json.loads(file.metadata()["pretraining"])
        assert (made["recipe"], made["steps"], made["seed"]) == ("nano-1", "5", "0")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert tensor_sha256(stored) == report.sha256


def test_the_seed_decides_and_the_global_generator_is_left_alone(
    data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = pretrain_nano(data, tmp_path / "a", steps=1, seed=0)
    torch.manual_seed(4)
    assert pretrain_nano(data, tmp_path / "b", steps=1, seed=0).sha256 == first.sha256
    assert pretrain_nano(data, tmp_path / "c", steps=1, seed=1).sha256 != first.sha256
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_checkpoint_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"

    def kill(progress: PretrainProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        pretrain_nano(data, out, steps=3, checkpoint_steps=1, progress=kill)
    with pytest.raises(MismatchError, match="another run"):
        pretrain_nano(data, out, steps=3, seed=1)


def test_what_cannot_be_used_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        pretrain_nano(data, tmp_path / "w", steps=0)
    (tmp_path / "there").write_bytes(b"")
    with pytest.raises(AlreadyExistsError, match="there"):
        pretrain_nano(data, tmp_path / "there")
    with pytest.raises(NotFoundError, match=r"omniglot.background\.parquet"):
        pretrain_nano(tmp_path, tmp_path / "w")
    write(tmp_path / "omniglot" / "background.parquet", 4, 32, 2, "L", column="picture")
    with pytest.raises(DataError, match=r"lacks \['image'\]"):
        pretrain_nano(tmp_path, tmp_path / "w")


def test_augmented_glyphs_stay_grey_upright_and_light_on_dark() -> None:
    # A bright bar in the upper half: a half turn or a mirror image would move its mass.
    images = torch.zeros(64, 1, 32, 32)
    images[:, :, 8:11, 6:26] = 1
    views = augment(images, torch.Generator().manual_seed(0), glyphs=True)
    assert views.shape == images.shape
    assert views.min() >= 0
    assert views.max() <= 1
    assert views.mean() < 0.5
    assert views[:, :, :16].sum() > 2 * views[:, :, 16:].sum()
    assert len({view.numpy().tobytes() for view in views}) == 64
    again = augment(images, torch.Generator().manual_seed(0), glyphs=True)
    assert torch.equal(views, again)
    assert images.unique().tolist() == [0, 1]


def oracle_histogram(image: Tensor) -> Tensor:
    """Signed directions in 4 x 4 cells, pixel by pixel."""
    padded = np.pad(image.numpy(), 1, mode="edge")
    cells = np.zeros((8, 4, 4))
    for y in range(32):
        for x in range(32):
            dx = padded[y + 1, x + 2] - padded[y + 1, x]
            dy = padded[y + 2, x + 1] - padded[y, x + 1]
            turn = math.atan2(dy, dx) % (2 * math.pi) / (math.pi / 4)
            low, part = int(turn) % 8, turn % 1
            cells[low, y // 8, x // 8] += (1 - part) * math.hypot(dx, dy)
            cells[(low + 1) % 8, y // 8, x // 8] += part * math.hypot(dx, dy)
    return torch.from_numpy(np.sqrt(cells / cells.sum() * 128)).flatten()


def test_descriptor_against_an_explicit_loop() -> None:
    images = torch.rand(
        2, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    described = describe(images.expand(-1, 3, -1, -1))
    assert described.shape == (2, DESCRIPTOR_DIM)
    for image, found in zip(images[:, 0], described, strict=True):
        torch.testing.assert_close(found[:128], oracle_histogram(image), rtol=1e-4, atol=1e-4)
        thumbnail = image.reshape(8, 4, 8, 4).mean(dim=(1, 3)).flatten()
        expected = (thumbnail - thumbnail.mean()) / thumbnail.std()
        torch.testing.assert_close(found[128:], expected, rtol=1e-9, atol=1e-9)


def test_an_empty_image_has_a_finite_descriptor() -> None:
    assert describe(torch.zeros(1, 3, 32, 32)).isfinite().all()
