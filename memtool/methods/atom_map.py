"""Which atom fires where: the gate of one adapted map over the tokens of an image (MoRAM)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from memtool.adapters.layout import Site
from memtool.errors import ConfigError, did_you_mean
from memtool.methods.atom_watch import activation_map
from memtool.methods.method import first
from memtool.methods.moram import SUBJECT_SAMPLES, Moram
from memtool.methods.results import Prediction, Result, TaskShare
from memtool.reports.atom_map import AtomPicture, check_suffix, write_atom_picture
from memtool.reports.table import Grid
from memtool.streams import load_image


class AtomPlace(BaseModel):
    """One atom: number `rank` of those of its task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: int
    rank: int


class AtomMap(Result):
    """The gate's weights at one adapted map, mean over the samples.

    `weights[i][n]` is that of atom i, in the order of `atoms`, for token n: first `prefix_tokens`
    that are no patch (the class token), then the patches row by row, `side` a row. `tasks` are
    means over all tokens; what is missing to one fell below the threshold.
    """

    schema_: Literal["memtool.explain-atoms"] = Field("memtool.explain-atoms", alias="schema")
    version: str
    subject: str
    samples: int
    site: str
    block: int
    score_norm: str
    topk: int
    prefix_tokens: int
    side: int
    tasks: tuple[TaskShare, ...]
    atoms: tuple[AtomPlace, ...]
    weights: tuple[tuple[float, ...], ...]
    prediction: Prediction | None = None
    out: Path | None = None


def explain_atoms(
    method: Moram,
    *,
    task: str | None = None,
    image: Path | None = None,
    layer: str | None = None,
    block: int | None = None,
    version: str = "HEAD",
    out: Path | None = None,
) -> AtomMap:
    """Which atoms the tokens of an image, or of a task's test images, choose at one adapted map.

    `layer` is a target, as "v" or "fc1" (none: the first configured one), and `block` its block
    (none: the last). `out` is a plot (.svg, .png) or a page (.html). Raises ConfigError for
    anything but one subject, a layer or block that is not adapted, and another kind of file.
    """
    if (task is None) == (image is None):
        raise ConfigError("what should be explained?", expected="one of --task and --image")
    if out is not None:
        check_suffix(out)
    work = method.workspace
    site = _site(work.layout.sites, layer or method.config.backbone.targets[0], block)
    snapshot = method.snapshot(version)
    prediction = None
    if task is not None:
        chosen = work.task(task)
        images = first(chosen.test, SUBJECT_SAMPLES).images
        subject = f"task {chosen.number} {chosen.name}"
    else:
        assert image is not None
        subject = str(image)
        images = load_image(image, method.config.backbone.image_size)[None]
        prediction = method.prediction(snapshot, images)
    weights = activation_map(
        work.engine, work.backbone, snapshot.bank, snapshot.gate, site.name, images
    ).T.double()
    stored = snapshot.view.atoms(site.name)
    owners = snapshot.bank.bank(site.name).owner.tolist()
    result = AtomMap(
        version=snapshot.version,
        subject=subject,
        samples=len(images),
        site=site.name,
        block=site.block,
        score_norm=snapshot.gate.score_norm,
        topk=snapshot.gate.topk,
        prefix_tokens=work.backbone.prefix_tokens,
        side=round((weights.shape[1] - work.backbone.prefix_tokens) ** 0.5),
        tasks=tuple(
            TaskShare(
                name=record.name,
                task=number,
                task_name=record.meta.get("task_name"),
                share=float(weights[[owner == number for owner in owners]].sum(dim=0).mean()),
            )
            for record, number in zip(snapshot.view.atom_records, snapshot.tasks, strict=True)
        ),
        atoms=tuple(
            AtomPlace(task=owner, rank=int(rank))
            for owner, rank in zip(owners, stored.rank, strict=True)
        ),
        weights=tuple(tuple(row) for row in weights.tolist()),
        prediction=prediction,
        out=out,
    )
    if out is not None:
        work.engine.on_main(lambda: write_atom_picture(as_picture(result), out))
    return result


def as_picture(result: AtomMap) -> AtomPicture:
    """What a plot and a page show of a map of atoms."""
    names = {one.task: f"{one.task} {one.task_name or ''}".strip() for one in result.tasks}
    about = f"{result.site}, norm over the {result.score_norm}, version {result.version}"
    if result.prediction is not None:
        about += f"; {result.prediction.label} ({100 * result.prediction.probability:.1f} %)"
    return AtomPicture(
        title=result.subject,
        about=about,
        tasks=tuple(names[atom.task] for atom in result.atoms),
        weights=np.array(result.weights),
        prefix_tokens=result.prefix_tokens,
        side=result.side,
        parts=task_grid(result),
    )


def task_grid(result: AtomMap) -> Grid:
    """Weight of every task at this map, and the atom of it that fires most."""
    weights = np.array(result.weights)
    prefix = result.prefix_tokens
    rows = []
    for one in result.tasks:
        mine = [place for place, atom in enumerate(result.atoms) if atom.task == one.task]
        if not mine:
            rows.append((one.name, "-", "-", "-"))
            continue
        own = weights[mine]
        best = int(own.mean(axis=1).argmax())
        ahead = f"{own[:, :prefix].sum(axis=0).mean():.3f}" if prefix else "-"
        atom = result.atoms[mine[best]].rank
        rows.append((one.name, f"{one.share:.3f}", ahead, f"{atom} ({own[best].mean():.3f})"))
    return Grid(
        title=f"Weight on the atoms of every task at {result.site}",
        header=("atoms of", "all tokens", "class token", "strongest atom"),
        rows=tuple(rows),
        notes=("What is missing to 1 fell below the threshold.",),
    )


def _site(sites: tuple[Site, ...], layer: str, block: int | None) -> Site:
    """The adapted map of a target in a block. Raises ConfigError when there is none."""
    named = {(site.block, site.slice or site.module.rpartition(".")[2]): site for site in sites}
    layers = sorted({name for _, name in named})
    blocks = sorted({number for number, _ in named})
    if layer not in layers:
        raise ConfigError(f"--layer {layer!r} is not adapted", expected=did_you_mean(layer, layers))
    number = blocks[-1] if block is None else block
    if (number, layer) not in named:
        raise ConfigError(
            f"--block {number}: no adapted {layer} there",
            expected=f"one of {', '.join(map(str, blocks))}",
        )
    return named[number, layer]
