"""What backbones there are, and what of each can be adapted, without the numbers of any.

A model is built on torch's meta device, where tensors have shapes only, and surveyed as a backbone
is when it is opened; that takes about a second. No weights are fetched.
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
    """A model as a backbone, by the name that it has in settings.

    `widths` are those of the inputs of its blocks, each once, `dim` that of its features;
    `image_size`, pixels a side, is what it was made for. `problem` says why it is none, with no
    targets.
    """

    name: str
    parameters: int
    image_size: int
    blocks: int = 0
    widths: tuple[int, ...] = ()
    dim: int = 0
    targets: tuple[str, ...] = ()
    problem: str | None = None


def names_of(wanted: str | None) -> list[str]:
    """Names of backbones: models of timm in its order, or the one that begins with `hf:`.

    All of timm's, or those with a word in them, or by a pattern. Raises NotFoundError where none is
    so called.
    """
    import timm

    if wanted is not None and wanted.startswith("hf:"):
        return [wanted]
    every: list[str] = timm.list_models()
    if wanted is None:
        return [f"timm:{name}" for name in every]
    wanted = wanted.removeprefix("timm:")
    found = [name for name in every if fnmatch.fnmatchcase(name, wanted)]
    found = found or [name for name in every if fnmatch.fnmatchcase(name, f"*{wanted}*")]
    if not found:
        raise NotFoundError(
            f"timm has no model {wanted!r}",
            expected=like(wanted),
            remedy="memtool backbones, which lists all names; or memtool backbones 'resnet1*'",
        )
    return [f"timm:{name}" for name in found]


def like(wanted: str) -> str:
    """What to say of a name that timm does not know, whatever weights this names: those near it."""
    import timm

    name = wanted.partition(".")[0]
    close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.3)
    return did_you_mean(wanted, close) if close else "a name, a part of one, or a pattern"


def described(names: list[str]) -> Iterator[Listed]:
    """Each of some models, as it would be adapted. Raises NotFoundError for an hf: that is not."""
    for name in names:
        yield _described(name)


def _described(name: str) -> Listed:
    from memtool.backbones import hf_images, timm_models
    from memtool.backbones.as_written import survey_of

    family, _, model = name.partition(":")
    size, numbers = 0, 0
    try:
        built, reading = hf_images.on_meta(name) if family == "hf" else timm_models.on_meta(model)
        numbers = sum(parameter.numel() for parameter in built.parameters())
        size = reading.made_for or 224
        found = survey_of(built, name, reading, size)
    except NotFoundError:
        raise
    except MemtoolError as error:
        blind = "meta" in str(error.__cause__).lower()  # torch, of what looks at numbers
        problem = "not told without its weights: try it" if blind else error.message
        return Listed(name, numbers, size, problem=problem)
    widths = tuple(dict.fromkeys(block.dim for block in found.blocks))
    return Listed(name, numbers, size, len(found.blocks), widths, found.dim, found.targets)
