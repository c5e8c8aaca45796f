"""Names become classes here: those of memtool, and those of other people's packages.

What ships is a table of strings, so that naming a thing imports nothing. Everything else comes from

    an entry point    of the groups memtool.methods, memtool.baselines, memtool.backbones and
                      memtool.separations: a name that an installed package gives
    module:Class      imported as `python -m` would: the working directory counts
    file.py:Class     the same of one file

Entry points are looked up only for a name that does not ship.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from memtool.errors import ConfigError, MemtoolError, NotFoundError, did_you_mean
from memtool_stores.printable import shown

Kind = Literal["methods", "baselines", "backbones", "separations"]

SHIPPED: Mapping[Kind, Mapping[str, str]] = {
    "methods": {
        "mira": "memtool.methods.mira.method:Mira",
        "moram": "memtool.methods.moram.method:Moram",
        "modulation": "memtool.methods.modulation.method:Modulation",
    },
    "baselines": {
        "zero-shot": "memtool.methods.baselines.zero_shot:ZeroShot",
        "in-context": "memtool.methods.baselines.zero_shot:InContext",
        "frozen": "memtool.methods.baselines.frozen:frozen",
        "fine-tune": "memtool.methods.baselines.fine_tune:FineTune",
        "sequential": "memtool.learning.learner:Learner",
        "ewc": "memtool.methods.baselines.ewc:Ewc",
        "lwf": "memtool.methods.baselines.lwf:Lwf",
        "o-lora": "memtool.methods.baselines.o_lora:OLora",
        "inf-lora": "memtool.methods.baselines.inf_lora:InfLora",
        "moe-lora": "memtool.methods.baselines.moe_lora:MoeLora",
        "text-keys": "memtool.methods.baselines.text_keys:TextKeys",
        "joint": "memtool.methods.baselines.joint:joint",
        "ranpac": "memtool.methods.baselines.ranpac:RANPAC",
        "aper": "memtool.methods.baselines.aper:APER",
        "fsa": "memtool.methods.baselines.fsa:FSA",
        "l2p": "memtool.methods.baselines.l2p:L2p",
        "dual-prompt": "memtool.methods.baselines.dual_prompt:DualPrompt",
        "coda-prompt": "memtool.methods.baselines.coda_prompt:CodaPrompt",
        "s-prompts": "memtool.methods.baselines.s_prompts:SPrompts",
        "rail": "memtool.methods.baselines.rail:rail",
        "slca": "memtool.methods.baselines.slca:Slca",
        "ease": "memtool.methods.baselines.ease:Ease",
        "mos": "memtool.methods.baselines.mos:Mos",
        "tuna": "memtool.methods.baselines.tuna:Tuna",
        "sd-lora": "memtool.methods.baselines.sd_lora:SdLora",
        "treelora": "memtool.methods.baselines.tree_lora:TreeLora",
        "er": "memtool.methods.baselines.replay:Er",
        "der++": "memtool.methods.baselines.der:DerPlusPlus",
        "erm": "memtool.methods.baselines.sources:trained_sources",
    },
    "backbones": {
        "nano": "memtool.backbones.nano:create_nano",
        "timm": "memtool.backbones.timm_models:create_timm",
        "open_clip": "memtool.backbones.open_clip:create_open_clip",
        "hf": "memtool.backbones.hf_images:create_hf_images",
        "open_clip_image": "memtool.backbones.clip_image:create_clip_image",
    },
    "separations": {
        "softmax": "memtool.memories.separation:softmax",
        "affine": "memtool.memories.separation:affine",
        "identity": "memtool.memories.separation:identity",
        "relu": "memtool.memories.separation:relu",
        "tanh": "memtool.memories.separation:tanh",
        "normalised": "memtool.memories.separation:normalised",
        "sigmoid": "memtool.memories.separation:sigmoid",
        "topk": "memtool.memories.separation:topk",
        "max": "memtool.memories.separation:largest",
        "power": "memtool.memories.separation:power",
        "sparsemax": "memtool.memories.separation:sparsemax",
        "entmax": "memtool.memories.separation:entmax",
    },
}
"""By kind and name: where it is, as "module:Class"."""

HOOKS: Mapping[Kind, tuple[str, ...]] = {
    "methods": ("open", "adapt", "write", "consolidate", "retrieve", "evaluate"),
    "baselines": (),
    "backbones": (),
    "separations": (),
}
"""What a class of other people must have to be of a kind; without any, it must be callable."""


_FOUND: set[tuple[Kind, str]] = set()
"""Names of other packages that this process has followed, because a person gave them."""


@dataclass(frozen=True)
class Named:
    """The mark of a setting whose words are names of a kind, or one of `also`.

    Pydantic takes a name that could be one: what it stands for is imported when it is used.
    """

    kind: Kind
    also: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What can be written without any other package."""
        return (*self.also, *SHIPPED[self.kind])

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """As of the type that is marked, and then `known`."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        if name not in self.also and not known(self.kind, name):
            raise ValueError(did_you_mean(name, (*self.also, *existing(self.kind))))
        return name


def existing(kind: Kind) -> tuple[str, ...]:
    """The names of a kind that ship, and those that installed packages give."""
    return (*SHIPPED[kind], *(name for name in _entry_points(kind) if name not in SHIPPED[kind]))


def known(kind: Kind, name: str) -> bool:
    """Whether a name stands for something, as far as that can be told without importing it."""
    return name in SHIPPED[kind] or ":" in name or name in _entry_points(kind)


def is_installed(kind: Kind, name: str) -> bool:
    """Whether a name can be followed without running code that nobody installed or imported yet.

    So it is for what a stranger's file names: what ships, what an installed package registered,
    what was found by this name before, and a class of the kind that this process has already.
    """
    if name in SHIPPED[kind] or (kind, name) in _FOUND or name in _entry_points(kind):
        return True
    module, _, attribute = name.rpartition(":")
    found = getattr(sys.modules.get(_module_name(module)), attribute, None)
    return bool(HOOKS[kind]) and isinstance(found, type) and not _lacking(kind, found)


def require_installed(kind: Kind, name: str, given: str) -> None:
    """Raise NotFoundError for what a memory names and is not here; no code runs on its word."""
    subject = f"the memory was made with the {kind[:-1]} {shown(name)}, which is not installed here"
    if not known(kind, name):
        raise NotFoundError(
            subject, remedy=f"install the package that has it, or give a {kind[:-1]} module:Class"
        )
    if not is_installed(kind, name):
        raise NotFoundError(
            subject,
            expected="its name from you, too: no code runs because a memory names it",
            remedy=given,
        )


def find(kind: Kind, name: str) -> Any:
    """What a name stands for, imported.

    Raises ConfigError for a name that nobody has, for a module that cannot be imported or lacks the
    class, and for one that is not what its kind must be.
    """
    if name in SHIPPED[kind]:
        place, _, attribute = SHIPPED[kind][name].partition(":")
        return getattr(import_module(place), attribute)
    subject, where = f"{kind[:-1]} {name}", name
    if ":" not in name:
        entry = _entry_points(kind).get(name)
        if entry is None:
            raise ConfigError(
                f"no {kind[:-1]} {shown(name)}",
                expected=did_you_mean(name, existing(kind)),
                remedy="install the package that has it, or name it as package.module:Class",
            )
        where = entry.value
        if entry.dist is not None:
            subject += f" of the package {entry.dist.name} {entry.dist.version}"
    place, _, attribute = where.rpartition(":")
    module = _imported(kind, subject, place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [
                word
                for word, value in vars(module).items()
                if isinstance(value, type) and value.__module__ == module.__name__
            ]
            raise ConfigError(
                f"{subject}: {place} has no {shown(attribute)}",
                expected=did_you_mean(attribute, there) if there else "the name of a class there",
            )
        found = getattr(found, part)
    _require(kind, subject, attribute, found)
    _FOUND.add((kind, name))
    return found


def _entry_points(kind: Kind) -> dict[str, metadata.EntryPoint]:
    """What installed packages give, by name; the first of two packages with one name."""
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=f"memtool.{kind}"):
        found.setdefault(entry.name, entry)
    return found


def _imported(kind: Kind, subject: str, place: str) -> ModuleType:
    """The module of a dotted name or a file. Raises ConfigError that says what went wrong."""
    try:
        if place.endswith(".py"):
            return _module_of_file(place)
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        return import_module(place)
    except BaseException as error:  # a stranger's module may raise anything
        if isinstance(error, MemtoolError) or not isinstance(error, Exception):
            raise
        if isinstance(error, FileNotFoundError) and error.filename == place:
            raise ConfigError(f"{subject}: there is no file {place}") from error
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{place}.".startswith(f"{absent}."):
            raise ConfigError(
                f"{subject}: there is no module {absent}",
                expected=f"{did_you_mean(place, existing(kind))}; or a module that is installed or "
                "in the working directory",
                remedy="install its package, or name it as path/to/file.py:Class",
            ) from error
        raise ConfigError(
            f"{subject}: {place} cannot be imported: {type(error).__name__}: {error}"
            + _line_of(error)
        ) from error


def _module_name(place: str) -> str:
    """What a dotted name or a file is called among the modules of this process."""
    if not place.endswith(".py"):
        return place
    path = Path(place).expanduser().absolute()
    return f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"


def _module_of_file(place: str) -> ModuleType:
    name = _module_name(place)
    if name in sys.modules:
        return sys.modules[name]
    path = Path(place).expanduser()
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(2, "no such file", place)
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: a dataclass looks its module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _line_of(error: Exception) -> str:
    """Where an import failed, " (file:line)"; nothing where the error has no place of its own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    others = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f" ({others[-1].filename}:{others[-1].lineno})" if others else ""


def _require(kind: Kind, subject: str, attribute: str, found: Any) -> None:
    """Raise ConfigError unless what was found is what its kind must be."""
    hooks = HOOKS[kind]
    if not hooks:
        if not callable(found):
            raise ConfigError(
                f"{subject}: {attribute} is a {type(found).__name__}",
                expected="a class or a function",
            )
        return
    if not isinstance(found, type):
        raise ConfigError(
            f"{subject}: {attribute} is a {type(found).__name__}",
            expected=f"a class with {', '.join(hooks)}",
        )
    lacking = _lacking(kind, found)
    if lacking:
        raise ConfigError(
            f"{subject}: the class {attribute} has no {', '.join(lacking)}",
            expected=f"a class with {', '.join(hooks)}",
        )


def _lacking(kind: Kind, found: type) -> list[str]:
    """The names that a class would need to be of a kind, and does not have."""
    lacking = [hook for hook in HOOKS[kind] if not callable(getattr(found, hook, None))]
    if isabstract(found):
        lacking += sorted(set(getattr(found, "__abstractmethods__", ())) - set(lacking))
    return lacking
