"""Which atom fires where: the gate of one adapted map over the tokens of an input (MoRAM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from memtool.adapters.layout import Site
from memtool.backbones.interface import TwoTowers
from memtool.errors import ConfigError, did_you_mean
from memtool.methods.explanation import AtomMap, AtomPlace
from memtool.methods.moram.measure import AtomMeasure
from memtool.methods.moram.method import Moram
from memtool.methods.moram.state import AtomSnapshot
from memtool.methods.moram.watch import activation_map
from memtool.methods.results import TaskShare
from memtool.methods.subject import Subject, subject_of
from memtool.reports.shown import AtomPicture, format_of
from memtool.reports.table import Grid
from memtool.streams.task import Texts
from memtool.workspace import Workspace


def explain_atoms(
    method: Moram,
    *,
    task: str | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    layer: str | None = None,
    block: int | None = None,
    version: str = "HEAD",
    out: Path | None = None,
) -> AtomMap:
    """Which atoms the tokens of an input, or of a task's test samples, choose at one adapted map.

    `layer` is a target, as "v" or "fc1" (none: the first configured one), and `block` its block
    (none: the last). `out` is a plot (.svg, .png) or a page (.html). Raises ConfigError for
    anything but one subject, a layer or block that is not adapted, and another kind of file;
    DataError for a prompt that is too long, where these are refused.
    """
    if out is not None:
        format_of(out)
    work = method.workspace
    site = _site(work, layer, block)
    subject = subject_of(work, task=task, image=image, prompt=prompt)
    snapshot = method.read(version) if subject.task is None else method.snapshot(version)
    of_texts, alone = work.reads == "texts", subject.task is None
    weights = activation_map(
        work,
        snapshot.bank,
        snapshot.gate,
        site.name,
        subject.samples,
        by_text=of_texts and not alone,
    ).T
    changes: dict[str, Any] = {"out": out}
    if of_texts:
        changes["columns"] = _columns(work, subject)
    else:
        prefix_tokens = work.backbone.prefix_tokens
        side = round((weights.shape[1] - prefix_tokens) ** 0.5)
        changes |= {"prefix_tokens": prefix_tokens, "side": side}
    if alone:
        prediction, answer = AtomMeasure(work).outcome(snapshot, subject.samples)
        changes |= {"prediction": prediction, "answer": answer}
    result = _map_of(snapshot, site, weights, subject).model_copy(update=changes)
    if out is not None:
        from memtool.reports.atom_map import write_atom_picture  # loads the plotter

        work.engine.on_main(lambda: write_atom_picture(as_picture(result), out))
    return result


def _columns(work: Workspace, subject: Subject) -> tuple[str, ...]:
    """The tokens of a prompt, or a name for each text of a task."""
    assert isinstance(subject.samples, Texts)
    prompts = subject.samples.prompts
    if subject.task is not None:
        return tuple(f"text {number}" for number in range(1, len(prompts) + 1))
    ids = work.backbone.encode(prompts).tokens[0].tolist()
    return tuple(work.backbone.token_texts(ids))


def _map_of(snapshot: AtomSnapshot, site: Site, weights: Tensor, subject: Subject) -> AtomMap:
    """The map of weights (atoms, columns) at a site."""
    stored = snapshot.view.atoms(site.name)
    owners = snapshot.bank.bank(site.name).owner.tolist()
    return AtomMap(
        version=snapshot.version,
        subject=subject.words,
        samples=len(subject),
        site=site.name,
        block=site.block,
        score_norm=snapshot.gate.score_norm,
        topk=snapshot.gate.topk,
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
    )


def as_picture(result: AtomMap) -> AtomPicture:
    """What a plot and a page show of a map of atoms."""
    names = {one.task: f"{one.task} {one.task_name or ''}".strip() for one in result.tasks}
    about = f"{result.site}, norm over the {result.score_norm}, version {result.version}"
    if result.prediction is not None:
        about += f"; {result.prediction.label} ({100 * result.prediction.probability:.1f} %)"
    if result.answer is not None:
        about += f"; answer: {result.answer}"
    return AtomPicture(
        title=result.subject,
        about=about,
        tasks=tuple(names[atom.task] for atom in result.atoms),
        weights=np.array(result.weights),
        prefix_tokens=result.prefix_tokens,
        side=result.side,
        columns=result.columns,
        parts=task_grid(result),
    )


def task_grid(result: AtomMap) -> Grid:
    """Weight of every task at this map, and the atom of it that fires most."""
    weights = np.array(result.weights)
    prefix = result.prefix_tokens
    rows = []
    for one in result.tasks:
        mine = [place for place, atom in enumerate(result.atoms) if atom.task == one.task]
        own = weights[mine]
        cells = [f"{one.share:.3f}", f"{own[:, :prefix].sum(axis=0).mean():.3f}" if prefix else ""]
        best = int(own.mean(axis=1).argmax()) if mine else 0
        atom = f"{result.atoms[mine[best]].rank} ({own[best].mean():.3f})" if mine else "-"
        rows.append((one.name, *filter(None, cells), atom))
    ahead = ("class token",) if prefix else ()
    return Grid(
        title=f"Weight on the atoms of every task at {result.site}",
        header=("atoms of", "all tokens", *ahead, "strongest atom (its weight)"),
        rows=tuple(rows),
        notes=("What is missing to 1 fell below the threshold.",),
    )


def _site(work: Workspace, layer: str | None, block: int | None) -> Site:
    """The adapted map of a target (none: the first configured one) in a block (none: the last).

    Raises ConfigError when there is none.
    """
    targets = work.config.backbone.targets
    layer = targets[0] if layer is None else layer
    if layer not in targets:
        raise ConfigError(
            f"--layer {layer!r} is not adapted",
            expected=did_you_mean(layer, targets),
            remedy="the names of backbone.targets, as the memory was trained with",
        )
    found = {site.block: site for site in work.backbone.sites((layer,))}
    if isinstance(work.backbone, TwoTowers):  # images go through one of its towers
        depth = work.backbone.image_depth
        found = {number: site for number, site in found.items() if number < depth}
    number = max(found) if block is None else block
    if number not in found:
        raise ConfigError(
            f"--block {number}: no adapted {layer} there",
            expected=f"one of {', '.join(map(str, sorted(found)))}",
        )
    return found[number]
