"""Pre-training of nano: Omniglot, Fashion-MNIST and EuroSAT, never a digit.

Three classification heads (sum of cross-entropies) and one linear head that regresses a descriptor
of the augmented image from the class token. The descriptor keeps what the classes alone would throw
away: without it, a linear probe on handwritten digits stops well below what it reaches here.

Every step draws from a generator of its own, made from the seed and the step number. So a run that
was killed goes on from its checkpoint exactly as if it had never stopped, and the same seed, thread
count, torch version and kind of processor give the same weights.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool import sealed
from memtool.backbones.nano import NANO_IMAGE_SIZE, NANO_MEAN, NANO_STD, build_nano
from memtool.backbones.plain_vit import PlainAttention
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.errors import (
    AlreadyExistsError,
    ConfigError,
    CorruptError,
    DataError,
    DivergedError,
    MismatchError,
    NotFoundError,
)

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

RECIPE = "nano-1"
DESCRIPTOR_DIM = 192

_METADATA = "pretraining"
_PEAK_LR = 1e-3
# Its error is a mean over 192 numbers: with weight 1 the class token learns little in this time.
_DESCRIPTOR_WEIGHT = 10.0
_WARMUP_STEPS = 200
_LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Corpus:
    """One pre-training data set: images uint8 (n, channels, 32, 32), labels int64 (n,)."""

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    per_batch: int
    glyphs: bool


@dataclass(frozen=True)
class PretrainProgress:
    """Where a run stands: losses and accuracies are those of this step's batch."""

    step: int
    steps: int
    loss: float
    descriptor_loss: float
    accuracy: dict[str, float]
    images_per_second: float


@dataclass(frozen=True)
class PretrainReport:
    """What a finished run made.

    `sha256` is that of the fp16 tensors by name; `seconds` and `images_per_second` count the steps
    since the last start.
    """

    path: Path
    sha256: str
    parameters: int
    steps: int
    seed: int
    seconds: float
    images_per_second: float
    last: PretrainProgress


def pretrain_nano(
    data: Path,
    out: Path,
    *,
    steps: int = 3200,
    seed: int = 0,
    threads: int = 1,
    checkpoint_steps: int = 200,
    progress: Callable[[PretrainProgress], None] | None = None,
) -> PretrainReport:
    """Pre-train nano on the folders of `data` and write fp16 weights to `out`.

    `data` holds omniglot/background.parquet, omniglot/evaluation.parquet,
    fashion_mnist/train.parquet and eurosat/train.parquet (columns image, label). A checkpoint
    beside `out` (`<out>.checkpoint`) is written every `checkpoint_steps`, taken up by the next call
    with the same arguments and removed at the end. `progress` is called after every step.

    Raises NotFoundError for a missing file, DataError for one that cannot be used,
    AlreadyExistsError when `out` exists, CorruptError for a checkpoint that is not what was saved,
    MismatchError for one of another run,
    DivergedError for a loss that is not finite.
    """
    if min(steps, threads, checkpoint_steps) < 1:
        raise ConfigError(
            f"steps={steps}, threads={threads}, checkpoint_steps={checkpoint_steps}",
            expected="all at least 1",
        )
    if out.exists():
        raise AlreadyExistsError(
            f"{out} is already there", remedy="name another file, or remove it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    corpora = load_corpora(data)
    run = {
        "recipe": RECIPE,
        "steps": str(steps),
        "seed": str(seed),
        "data_sha256": tensor_sha256(
            {f"{c.name}.{part}": getattr(c, part) for c in corpora for part in ("images", "labels")}
        ),
    }
    checkpoint = out.with_name(out.name + ".checkpoint")
    with _threads(threads):
        learner = _Learner(corpora, steps, seed)
        first = learner.resume(checkpoint, run) if checkpoint.exists() else 0
        started = time.perf_counter()
        for step in range(first, steps):
            update = learner.step(step)
            done = step + 1
            seconds = time.perf_counter() - started
            last = PretrainProgress(
                step=done,
                steps=steps,
                loss=update.loss,
                descriptor_loss=update.descriptor_loss,
                accuracy=update.accuracy,
                images_per_second=(done - first) * learner.batch_size / seconds,
            )
            if done % checkpoint_steps == 0 and done < steps:
                learner.save(checkpoint, {**run, "done": str(done)})
            if progress is not None:
                progress(last)
    weights = {name: t.to(torch.float16) for name, t in learner.model.state_dict().items()}
    _write(weights, out, run)
    checkpoint.unlink(missing_ok=True)
    return PretrainReport(
        path=out,
        sha256=tensor_sha256(weights),
        parameters=sum(t.numel() for t in weights.values()),
        steps=steps,
        seed=seed,
        seconds=seconds,
        images_per_second=last.images_per_second,
        last=last,
    )


# Data


def load_corpora(data: Path) -> tuple[Corpus, ...]:
    """The three data sets at 32 x 32, glyphs light on dark, from the parquet files of `data`."""
    background, background_labels = _read(data / "omniglot" / "background.parquet", grey=True)
    evaluation, evaluation_labels = _read(data / "omniglot" / "evaluation.parquet", grey=True)
    characters = int(background_labels.max()) + 1
    omniglot_labels = torch.cat([background_labels, evaluation_labels + characters])
    fashion, fashion_labels = _read(data / "fashion_mnist" / "train.parquet", grey=True)
    eurosat, eurosat_labels = _read(data / "eurosat" / "train.parquet", grey=False)

    def corpus(name: str, images: Tensor, labels: Tensor, per_batch: int, glyphs: bool) -> Corpus:
        return Corpus(name, images, labels, int(labels.max()) + 1, per_batch, glyphs)

    return (
        # Omniglot is dark ink on white paper.
        corpus("omniglot", 255 - torch.cat([background, evaluation]), omniglot_labels, 80, True),
        corpus("fashion_mnist", fashion, fashion_labels, 32, False),
        corpus("eurosat", eurosat, eurosat_labels, 16, False),
    )


def _read(path: Path, *, grey: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 1 or 3, 32, 32) and labels int64 (n,) of one parquet file."""
    from datasets import Dataset

    if not path.is_file():
        raise NotFoundError(
            f"no pre-training data at {path}",
            expected="omniglot/{background,evaluation}.parquet, fashion_mnist/train.parquet and "
            "eurosat/train.parquet with the columns image and label",
        )
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # datasets keeps what it reads; this is read once.
        table = Dataset.from_parquet(str(path), cache_dir=folder)
        return _pixels(table, path, grey=grey)


def _pixels(table: Dataset, path: Path, *, grey: bool) -> tuple[Tensor, Tensor]:
    missing = {"image", "label"} - set(table.column_names)
    if missing or len(table) == 0:
        raise DataError(f"{path} has {len(table)} rows and lacks {sorted(missing)}")
    images: list[npt.NDArray[np.uint8]] = [
        np.asarray(image.convert("L" if grey else "RGB")) for image in table["image"]
    ]
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{path} holds images of several sizes", expected="one size")
    stacked = torch.from_numpy(np.stack(images))
    pixels = stacked[:, None] if grey else stacked.permute(0, 3, 1, 2)
    if pixels.shape[-2:] != (NANO_IMAGE_SIZE, NANO_IMAGE_SIZE):
        pixels = _resize(pixels.float(), NANO_IMAGE_SIZE).round().clamp(0, 255).to(torch.uint8)
    return pixels.contiguous(), torch.tensor(list(table["label"]), dtype=torch.int64)


def _resize(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic to (n, c, size, size)."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


# Augmentation and target


def augment(images: Tensor, generator: torch.Generator, *, glyphs: bool) -> Tensor:
    """A random view of images in [0, 1], (n, c, s, s): a new tensor of the same shape.

    Turn within 12 degrees, scale 0.8 to 1.3, shear and shift; for 40 % down to 8 to 16 pixels and
    back; contrast, brightness, noise. Half of the glyphs get thicker strokes. Never an inversion, a
    quarter turn or colour for something grey: those stay for the domains that are learned later.
    """
    count, channels, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def chosen(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    if glyphs:
        thick = F.max_pool2d(images, kernel_size=3, stride=1, padding=1)
        images = torch.where(chosen(0.5)[:, None, None, None], thick, images)

    angle, scale, shear = uniform(-12, 12) * math.pi / 180, uniform(0.8, 1.3), uniform(-0.2, 0.2)
    shift_x, shift_y = 2 * uniform(-0.15, 0.15), 2 * uniform(-0.15, 0.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack(
        [
            torch.stack([cos, shear * cos - sin, shift_x], dim=1),
            torch.stack([sin, shear * sin + cos, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, [count, channels, size, size], align_corners=False)
    # Grey images lie on black; a photograph goes on beyond its edge.
    padding = "zeros" if channels == 1 else "reflection"
    images = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)

    coarse = chosen(0.4).nonzero()[:, 0]
    small = int(torch.randint(8, 17, (), generator=generator))
    if len(coarse):
        images[coarse] = _resize(_resize(images[coarse], small), size)

    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.06)[:, None, None, None]
    contrast, brightness = uniform(0.7, 1.1), uniform(-0.1, 0.1)
    lit = images * contrast[:, None, None, None] + brightness[:, None, None, None]
    return (lit + noise).clamp(0, 1)


def describe(images: Tensor) -> Tensor:
    """The descriptor (n, 192) of images (n, c, s, s) in [0, 1].

    128 numbers: gradient magnitude in 8 signed directions (linear between neighbours) and 4 x 4
    cells, each image's histogram divided by its sum, square-rooted and scaled to a mean square of
    one. 64 numbers: an 8 x 8 thumbnail, standardised by image.
    """
    grey = images.mean(dim=1)
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    magnitude = torch.sqrt(dx.square() + dy.square() + 1e-12)
    direction = torch.atan2(dy, dx) * (8 / (2 * math.pi))
    bins = torch.arange(8, dtype=images.dtype)[None, :, None, None]
    distance = torch.remainder(direction[:, None] - bins, 8)
    weight = (1 - torch.minimum(distance, 8 - distance)).clamp_min(0)
    cells = F.adaptive_avg_pool2d(weight * magnitude[:, None], 4).flatten(1)
    histogram = (cells / cells.sum(dim=1, keepdim=True).clamp_min(1e-6)).sqrt()
    histogram = histogram * math.sqrt(histogram.shape[1])
    thumbnail = F.adaptive_avg_pool2d(grey[:, None], 8).flatten(1)
    thumbnail = thumbnail - thumbnail.mean(dim=1, keepdim=True)
    thumbnail = thumbnail / thumbnail.std(dim=1, keepdim=True).clamp_min(1e-2)
    return torch.cat([histogram, thumbnail], dim=1)


# Learning


@dataclass(frozen=True)
class _Update:
    loss: float
    descriptor_loss: float
    accuracy: dict[str, float]


class _Learner:
    """Model, heads and optimiser of one run."""

    def __init__(self, corpora: tuple[Corpus, ...], steps: int, seed: int) -> None:
        self.corpora = corpora
        self.batch_size = sum(corpus.per_batch for corpus in corpora)
        self.steps = steps
        self.seed = seed
        # The model draws from the global generator: seed it here, and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build_nano()
            width = self.model.embed_dim
            self.heads = nn.ModuleDict({c.name: nn.Linear(width, c.classes) for c in corpora})
            self.heads["descriptor"] = nn.Linear(width, DESCRIPTOR_DIM)
        for module in self.model.modules():
            if isinstance(module, PlainAttention):
                # With 17 tokens the bf16 backward of torch's fused CPU attention halves the speed.
                module.fused = False
        self.named = dict(
            nn.ModuleDict({"model": self.model, "heads": self.heads}).named_parameters()
        )
        # Decay for the weights of linear maps only: not for biases, norms, class token, positions.
        decayed = [n for n, p in self.named.items() if n.endswith("weight") and p.ndim >= 2]
        kept = [n for n in self.named if n not in set(decayed)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.named[n] for n in decayed], "weight_decay": 0.05},
                {"params": [self.named[n] for n in kept], "weight_decay": 0.0},
            ],
            lr=_PEAK_LR,
            betas=(0.9, 0.98),
        )

    def step(self, step: int) -> _Update:
        """One update on the batch that belongs to this step."""
        generator = torch.Generator()
        # The low 32 bits are all that torch's CPU generator takes: mix seed and step into them.
        generator.manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0]))
        views: list[Tensor] = []
        labels: list[Tensor] = []
        for corpus in self.corpora:
            pick = torch.randint(len(corpus.labels), (corpus.per_batch,), generator=generator)
            view = augment(corpus.images[pick].float() / 255, generator, glyphs=corpus.glyphs)
            views.append(view.expand(-1, 3, -1, -1))
            labels.append(corpus.labels[pick])
        images = torch.cat(views)
        mean = torch.tensor(NANO_MEAN)[:, None, None]
        std = torch.tensor(NANO_STD)[:, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model((images - mean) / std).float()
        descriptor_loss = F.mse_loss(self.heads["descriptor"](features), describe(images))
        loss = _DESCRIPTOR_WEIGHT * descriptor_loss
        accuracy: dict[str, float] = {}
        parts = features.split([corpus.per_batch for corpus in self.corpora])
        for corpus, part, target in zip(self.corpora, parts, labels, strict=True):
            logits = self.heads[corpus.name](part)
            loss = loss + F.cross_entropy(logits, target, label_smoothing=_LABEL_SMOOTHING)
            accuracy[corpus.name] = float((logits.argmax(dim=1) == target).float().mean())
        if not torch.isfinite(loss):
            raise DivergedError(f"pre-training loss {float(loss)} at step {step + 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = _PEAK_LR * _schedule(step, self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.named.values()), 1.0)
        self.optimizer.step()
        return _Update(float(loss.detach()), float(descriptor_loss.detach()), accuracy)

    def save(self, path: Path, run: dict[str, str]) -> None:
        """Parameters and optimiser state as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[f"{name}/value"] = parameter.detach()
            for key, state in self.optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = state
        _write(tensors, path, run, private=True)

    def _wanted(self) -> set[str]:
        """The names of all tensors of a checkpoint."""
        parts = ("value", "step", "exp_avg", "exp_avg_sq")
        return {f"{name}/{part}" for name in self.named for part in parts}

    def resume(self, path: Path, run: dict[str, str]) -> int:
        """Load what `save` wrote and return the number of steps that are done.

        Raises CorruptError for a file that is not what was saved, MismatchError for one of another
        run. One without a checksum counts as none.
        """
        saved = sealed.read_tensors(path, remedy=f"the same command without {path}: from step 1")
        if not saved.sealed:
            _log.warning("%s has no checksum: it is left aside, and training begins anew", path)
            return 0
        written = json.loads(saved.metadata.get(_METADATA, "{}"))
        if not isinstance(written, dict) or not self._wanted() <= saved.tensors.keys():
            raise CorruptError(
                f"{path} is no checkpoint of this training",
                remedy=f"the same command without {path}: from step 1",
            )
        done = written.pop("done", None)
        if written != run or done is None or not 0 < int(done) < self.steps:
            raise MismatchError(
                f"{path} belongs to another run: {written}",
                expected=str(run),
                remedy="remove the checkpoint, or repeat the call that made it",
            )
        for name, parameter in self.named.items():
            parameter.data.copy_(saved.tensors[f"{name}/value"])
            self.optimizer.state[parameter] = {
                key: saved.tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(done)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up (200 steps, or a tenth of a short run), then a cosine to zero."""
    warmup = min(_WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], *, private: bool = False
) -> None:
    """A sealed file, whole or not at all: a killed run leaves the old file or the new one."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    described = {_METADATA: json.dumps(metadata, sort_keys=True)}
    sealed.write_tensors(path, contiguous, described, private=private)
