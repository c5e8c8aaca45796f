"""What backbones there are, and what of each can be adapted, without the numbers of any.

A model of timm is built on torch's meta device, where tensors have shapes only, and surveyed as a
backbone is when it is opened; that takes about a second. Nothing is fetched.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from memtool.errors import MemtoolError, NotFoundError, did_you_mean

MOST = 40
"""Models that are built to be looked at; of more only the names are told."""


@dataclass(frozen=True)
class Listed:
    """A model of timm as a backbone.

    `widths` are those of the inputs of its blocks, each once, `dim` that of its features; `size`,
    pixels a side, is what it was made for. `problem` says why it is none, with no targets.
    """

    name: str
    parameters: int
    size: int
    blocks: int = 0
    widths: tuple[int, ...] = ()
    dim: int = 0
    targets: tuple[str, ...] = ()
    problem: str | None = None


def names_of(wanted: str | None) -> list[str]:
    """Names of models of timm, in its order: all, or those with a word in them, or by a pattern.

    Raises NotFoundError where none is so called.
    """
    import timm

    every: list[str] = timm.list_models()
    if wanted is None:
        return every
    wanted = wanted.removeprefix("timm:")
    found = [name for name in every if fnmatch.fnmatchcase(name, wanted)]
    found = found or [name for name in every if fnmatch.fnmatchcase(name, f"*{wanted}*")]
    if not found:
        near = difflib.get_close_matches(wanted, every, n=5, cutoff=0.3)
        raise NotFoundError(
            f"timm has no model {wanted!r}",
            expected=did_you_mean(wanted, near) if near else "a name, a part of one, or a pattern",
            remedy="memtool backbones, which lists all names; or memtool backbones 'resnet1*'",
        )
    return found


def described(names: list[str]) -> Iterator[Listed]:
    """Each of some models, as it would be adapted."""
    for name in names:
        yield _described(name)


def _described(name: str) -> Listed:
    from timm.data import resolve_model_data_config

    from memtool.backbones.as_written import own_bias_apart, survey_of
    from memtool.backbones.timm_models import blocks_of, on_meta, read_timm

    size, numbers = 0, 0
    try:
        model = on_meta(name, None)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        size = resolve_model_data_config(model)["input_size"][-1]
        own_bias_apart(model)
        found = survey_of(
            model,
            f"timm:{name}",
            read=read_timm,
            names=blocks_of(model),
            size=size,
            last=getattr(model, "output_fmt", "") == "NHWC",
            native=size,
        )
    except MemtoolError as error:
        return Listed(name, numbers, size, problem=error.message)
    except NotImplementedError:  # what looks at numbers, which are not there
        return Listed(name, numbers, size, problem="not told without its weights: try it")
    widths = tuple(dict.fromkeys(block.dim for block in found.blocks))
    return Listed(name, numbers, size, len(found.blocks), widths, found.dim, found.targets)
