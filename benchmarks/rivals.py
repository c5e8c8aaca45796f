"""Rivals beside the public code of the toolbox PILOT, on the same features: accuracies in %.

`--pilot PATH` is a checkout of github.com/sun-hailong/LAMDA-PILOT, whose classes are imported and
run; nothing of it is here. CIFAR-100 in five tasks, 200 training and 100 test images each, ViT-Tiny
at 96 pixels. Both sides get the same features: f of the frozen model, and f* under one adapter that
learned the first task.

    ranpac       f*, M = 1,000, λ by each side's own rule
    simplecil    f*, cosines to class means
    aper         [f; f*], the same
    slca         f; the same heads of tasks before, aligned by each side after every task
    ease         the same adapters, one a task, and class means under each: completion and scores

L2P, DualPrompt and CODA-Prompt need PILOT's own backbones, and weights that it downloads; TUNA is
not in it. Values are ours less theirs after all five tasks, means over `--repeats` seeds (at most
3); the limit is 1.5 points either way. The seconds are those of adapters and features alone, of the
processor. `contrastive` is what MOS adds to a loss beside 0.1 times it: the mean cross-entropy of
f*·f* / 0.8 on batches of 48 and the class means before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import environment, progress
from memtool.config import resolve
from memtool.errors import NotFoundError
from memtool.heads import FeatureStatistics, LinearClassifier, ProjectedMoments
from memtool.learning.learner import Learner
from memtool.methods.baselines.aligned import gaussians
from memtool.methods.baselines.aper import APER
from memtool.methods.baselines.ease import Ease
from memtool.methods.baselines.mos import Mos, apart
from memtool.methods.baselines.ranpac import RANPAC
from memtool.methods.baselines.slca import Slca, slca_aligned
from memtool.settings import HeadSettings
from memtool.workspace import Workspace

CLASSES, TASKS, WIDTH = 100, 5, 1000
LIMIT = 1.5
"""Points between ours and theirs."""

Part = tuple[Tensor, Tensor]
"""Features (n, dim) and labels (n,)."""


def run(repeats: int, pilot: Path) -> dict[str, Any]:
    """All cases."""
    theirs = Pilot(pilot)
    begin = time.process_time()
    frozen, adapted, alone = features()
    frozen, adapted = in_order(frozen), in_order(adapted)
    seconds = time.process_time() - begin
    both = [
        tuple((torch.cat([a[0], b[0]], dim=1), a[1]) for a, b in zip(one, other, strict=True))
        for one, other in zip(frozen, adapted, strict=True)
    ]
    sides: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
        "ranpac": (lambda s: ranpac(adapted, s), lambda s: theirs.ranpac(adapted, s)),
        "simplecil": (lambda _: nearest(adapted), lambda _: theirs.nearest("simplecil", adapted)),
        "aper": (lambda _: nearest(both), lambda _: theirs.nearest("aper_adapter", both)),
        "slca": (lambda s: slca(frozen, s), lambda s: theirs.slca(frozen, s)),
        "ease": (lambda _: alone.ours, lambda _: theirs.ease(alone)),
        "heads before slca": (lambda s: share(trained(frozen, s)[-1], frozen),) * 2,
    }
    cases = []
    for name, (own, other) in sides.items():
        seeds = range(min(repeats, 3))
        mine, his = (float(np.mean([side(seed) for seed in seeds])) for side in (own, other))
        progress(f"{name}: ours {mine:.2f}, theirs {his:.2f}")
        cases.append(
            {
                "name": f"{name}: ours {mine:.2f}, theirs {his:.2f}",
                "value": mine - his,
                "limit": f"{LIMIT} either way",
                "passed": abs(mine - his) <= LIMIT,
            }
        )
    cases.append(
        {
            "name": "contrastive term of MOS, nats",
            "value": contrastive(adapted),
            "limit": None,
            "passed": True,
        }
    )
    cases.append(
        {"name": "adapters and features, s", "value": seconds, "limit": None, "passed": True}
    )
    return {
        "benchmark": "rivals",
        "environment": environment(),
        "passed": all(case["passed"] for case in cases),
        "cases": cases,
    }


@dataclass(frozen=True, eq=False)
class Apart:
    """Adapters of EASE, one a task: `ours` is what it reaches with them, in %.

    `means[j]` (cells, dim) are class means under adapter j, zero where it never saw the class;
    `tests` the test images of all tasks under adapter after adapter, (n, t · dim), with their
    cells.
    """

    ours: float
    means: list[Tensor]
    tests: list[Part]


def features() -> tuple[list[tuple[Part, Part]], list[tuple[Part, Part]], Apart]:
    """Training and test part of every task, frozen and under an adapter of the first task.

    And what EASE makes of an adapter for every task.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "stream.splits": TASKS,
            "stream.train_per_task": 200,
            "stream.test_per_task": 100,
            "train.epochs": 1,
            "runs": Path(folder),
            "store": str(Path(folder) / "memory"),
            "engine.precision": "fp32",
        }
        work = Workspace(
            resolve(preset="mira-cil", overrides=overrides, ambient=False).config, seed=0
        )
        tasks = work.stream.tasks
        learner = Learner(work, 1)
        progress("an adapter of the first task")
        learner.learn(tasks[0], "first session")

        def seen(of: Callable[[Any], Tensor]) -> list[tuple[Part, Part]]:
            return [
                tuple((of(part).float(), torch.from_numpy(np.array(part.labels))) for part in parts)  # type: ignore[misc]
                for parts in ((task.train, task.test) for task in tasks)
            ]

        progress("features")
        both = seen(lambda part: work.features(part.images)), seen(learner.features_of)
        progress("adapters of EASE")
        return *both, adapted_apart(work)


def adapted_apart(work: Workspace) -> Apart:
    """EASE after all tasks of a workspace."""
    tasks = work.stream.tasks
    ease = Ease(work, len(tasks))
    for task in tasks:
        ease.learn(task, f"task {task.number}")
    right, tests = [], []
    place = torch.empty(CLASSES, dtype=torch.int64)
    place[ease.cell_class] = torch.arange(len(ease.cell_class))
    for task in tasks:
        labels = torch.from_numpy(np.array(task.test.labels))
        right.append(ease.scores(task).argmax(dim=1) == labels)
        side_by_side = ease.test_features(task).transpose(0, 1).flatten(1)
        tests.append((side_by_side.float(), place[labels]))
    means = [
        torch.where((ease.cell_task >= adapter)[:, None], found, 0.0).float()
        for adapter, found in enumerate(ease.prototypes)
    ]
    return Apart(100 * float(torch.cat(right).double().mean()), means, tests)


def in_order(tasks: Sequence[tuple[Part, Part]]) -> list[tuple[Part, Part]]:
    """The same with classes numbered as they come, which PILOT's learners take for granted."""
    order = torch.cat([y.unique() for (_, y), _ in tasks])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return [((a, place[b]), (c, place[d])) for (a, b), (c, d) in tasks]


def share(predict: Callable[[Tensor], Tensor], tasks: Sequence[tuple[Part, Part]]) -> float:
    """The accuracy in % on the test parts of all tasks."""
    right = [predict(x).argmax(dim=1) == y for _, (x, y) in tasks]
    return 100 * float(torch.cat(right).double().mean())


# Ours -------------------------------------------------------------------------------------------


def ranpac(tasks: Sequence[tuple[Part, Part]], seed: int) -> float:
    """Our RanPAC after all tasks."""
    dim = tasks[0][0][0].shape[1]
    projected = ProjectedMoments(dim, WIDTH, seed, CLASSES)
    counted = FeatureStatistics(dim, CLASSES, projected)
    for (x, y), _ in tasks:
        counted.add(x, y)
        projected.measure(x, y)
    return share(RANPAC.head(counted, HeadSettings(width=WIDTH)), tasks)


def nearest(tasks: Sequence[tuple[Part, Part]]) -> float:
    """The nearest class means of our APER."""
    counted = FeatureStatistics(tasks[0][0][0].shape[1], CLASSES)
    for (x, y), _ in tasks:
        counted.add(x, y)
    return share(APER.head(counted, HeadSettings()), tasks)


def slca(tasks: Sequence[tuple[Part, Part]], seed: int) -> float:
    """Our alignment of the heads of all tasks."""
    head = trained(tasks, seed)[-1]
    known, targets, owners = [], list[int](), list[int]()
    for number, ((x, y), _) in enumerate(tasks):
        classes = y.unique().tolist()
        known += gaussians(x, y, classes)
        targets += classes
        owners += [number] * len(classes)
    found = slca_aligned(
        head,
        known,
        targets,
        owners,
        epochs=Slca.alignment_epochs,
        lr=Slca.alignment_lr,
        temperature=Slca.temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    return share(found, tasks)


def trained(tasks: Sequence[tuple[Part, Part]], seed: int) -> list[LinearClassifier]:
    """Linear heads after each task: its own rows learn against each other, by SGD on features."""
    generator = torch.Generator().manual_seed(seed)
    dim, found = tasks[0][0][0].shape[1], list[LinearClassifier]()
    whole = LinearClassifier(torch.zeros(CLASSES, dim), torch.zeros(CLASSES))
    for (x, y), _ in tasks:
        classes = y.unique()
        places = torch.searchsorted(classes, y)
        weight = (0.02 * torch.randn(len(classes), dim, generator=generator)).requires_grad_()
        bias = torch.zeros(len(classes), requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], 0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(20):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                F.cross_entropy(F.linear(x[rows], weight, bias), places[rows]).backward()
                optimizer.step()
        whole.weight[classes], whole.bias[classes] = weight.detach(), bias.detach()
        found.append(LinearClassifier(whole.weight.clone(), whole.bias.clone()))
    return found


def contrastive(tasks: Sequence[tuple[Part, Part]]) -> float:
    """The mean of MOS's contrastive term over batches of the last task."""
    known = [x[y == one].mean(dim=0) for (x, y), _ in tasks[:-1] for one in y.unique()]
    found = []
    for batch in tasks[-1][0][0].split(48):
        rows = torch.cat([torch.stack(known), batch])
        found.append(float(apart(rows, Mos.closeness)))
    return float(np.mean(found))


# Theirs -----------------------------------------------------------------------------------------


class Pilot:
    """The learners of a checkout, each with a network whose backbone passes features on."""

    def __init__(self, path: Path) -> None:
        """Raises NotFoundError for a folder that is no checkout."""
        if not (path / "models" / "ranpac.py").is_file():
            raise NotFoundError(
                f"{path} is no checkout of PILOT: it has no models/ranpac.py",
                remedy="git clone https://github.com/sun-hailong/LAMDA-PILOT, then --pilot DIR",
            )
        with _importing(path):
            self.modules = {
                name: importlib.import_module(f"models.{name}")
                for name in ("ranpac", "simplecil", "aper_adapter", "slca", "ease")
            }
            self.networks: Any = importlib.import_module("utils.inc_net")
            self.linears: Any = importlib.import_module("backbone.linears")

    def ranpac(self, tasks: Sequence[tuple[Part, Part]], seed: int) -> float:
        """Their projection, ridge and choice of λ."""
        torch.manual_seed(seed)  # their draws are of the global generator
        network = self._network("SimpleVitNet", tasks)
        learner = self._learner("ranpac", network, M=WIDTH, nb_classes=CLASSES)
        for number, ((x, y), _) in enumerate(tasks):
            network.update_fc(int(y.max()) + 1)
            if number == 0:
                learner.setup_RP()
            order = torch.randperm(len(x))
            with contextlib.redirect_stdout(io.StringIO()):
                learner.replace_fc([(None, x[order], y[order])], network, None)
        return self._share(network, tasks)

    def nearest(self, name: str, tasks: Sequence[tuple[Part, Part]]) -> float:
        """Their class means by cosine."""
        network = self._network("SimpleVitNet", tasks)
        learner = self._learner(name, network)
        for (x, y), _ in tasks:
            network.update_fc(int(y.max()) + 1)
            learner.train_dataset = SimpleNamespace(labels=y.numpy())
            learner.replace_fc([(None, x, y)], network, None)
        return self._share(network, tasks)

    def slca(self, tasks: Sequence[tuple[Part, Part]], seed: int) -> float:
        """Their alignment of the same heads, task after task."""
        torch.manual_seed(seed)
        network = self._network("SLCANet", tasks)
        network.old_fc, network.fc_with_ln = None, False
        learner = self._learner("slca", network)
        learner.logit_norm, learner.ca_epochs = Slca.temperature, Slca.alignment_epochs
        learner.lrate, learner.weight_decay = Slca.alignment_lr, 5e-4
        learner.task_sizes, learner.batch_size, learner._known_classes = [], 64, 0
        self.modules["slca"].DataLoader = lambda data, **_: [data]  # type: ignore[attr-defined]
        for number, (head, ((x, y), test)) in enumerate(
            zip(trained(tasks, seed), tasks, strict=True)
        ):
            classes = y.unique()
            learner._cur_task = number
            learner._total_classes = int(classes.max()) + 1
            learner.task_sizes.append(len(classes))
            network.update_fc(len(classes))
            with torch.no_grad():
                network.fc.heads[-1][0].weight.copy_(head.weight[classes])
                network.fc.heads[-1][0].bias.copy_(head.bias[classes])
            network.fc.backup()
            learner.test_loader = [(None, *test)]
            learner._compute_class_mean(_Data(x, y))
            if number:
                learner._stage2_compact_classifier(len(classes))
            found = self._share(network, tasks) if number == TASKS - 1 else 0.0
            network.fc.recall()
            learner._known_classes = learner._total_classes
        return found

    def ease(self, alone: Apart) -> float:
        """Their completion of prototypes, and their scores, of the same means and features."""
        dim, count = alone.means[0].shape[1], len(alone.means)
        size = CLASSES // count
        fc = self.linears.EaseCosineLinear(count * dim, CLASSES)
        fc.weight.data = torch.cat(alone.means, dim=1).clone()
        learner = self._learner("ease", SimpleNamespace(fc=fc, out_dim=dim))
        learner.init_cls = learner.inc = size
        learner.use_init_ptm, learner.moni_adam = False, False
        learner._cur_task, learner._total_classes = count - 1, CLASSES
        with torch.no_grad():
            learner.solve_sim_reset()
            right = [
                fc.forward_reweight(
                    x, count - 1, alpha=Ease.alpha, init_cls=size, inc=size, out_dim=dim
                )["logits"].argmax(dim=1)
                == y
                for x, y in alone.tests
            ]
        return 100 * float(torch.cat(right).double().mean())

    def _network(self, name: str, tasks: Sequence[tuple[Part, Part]]) -> Any:
        """A network of theirs over features; its constructor would load a backbone."""
        kind = getattr(self.networks, name)
        network = kind.__new__(kind)
        nn.Module.__init__(network)
        network.backbone = nn.Identity()
        network.backbone.out_dim = tasks[0][0][0].shape[1]
        network.fc = network.W_rand = network.RP_dim = None
        network._device, network.model_type = "cpu", "vit"
        return network

    def _learner(self, name: str, network: Any, **args: Any) -> Any:
        """A learner of theirs; its constructor would make a network of its own."""
        kind = self.modules[name].Learner
        learner = kind.__new__(kind)
        learner._network, learner._device, learner.args = network, "cpu", args
        learner._multiple_gpus = ["cpu"]
        return learner

    @staticmethod
    def _share(network: Any, tasks: Sequence[tuple[Part, Part]]) -> float:
        with torch.no_grad():
            return share(lambda x: network(x)["logits"], tasks)


class _Data:
    """What their data manager is asked: the training features of a class."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def get_dataset(self, classes: Any, **_: Any) -> tuple[None, None, Any]:
        own = self.y == int(classes[0])
        return None, None, (None, self.x[own], self.y[own])


@contextlib.contextmanager
def _importing(path: Path) -> Iterator[None]:
    """Modules of a checkout can be imported, under names that timm has given up since."""
    import timm.layers

    old = {"timm.models.layers": timm.layers}
    for name in ("weight_init", "helpers", "drop", "patch_embed", "mlp"):
        with contextlib.suppress(ImportError):
            old[f"timm.models.layers.{name}"] = importlib.import_module(f"timm.layers.{name}")
    before = {name: sys.modules.get(name) for name in old}
    sys.modules.update(old)
    sys.path.insert(0, str(path.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
