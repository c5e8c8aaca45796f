"""memtool: a frozen model, adapters in a versioned associative memory, a mixture for every input.

>>> from memtool import Mira, resolve                                     # doctest: +SKIP
>>> mira = Mira.open(resolve(preset="digits-dil").config, seed=0)         # doctest: +SKIP
>>> mira.adapt("1"); mira.write(); mira.consolidate(); mira.evaluate()    # doctest: +SKIP

Names are imported on first use: `import memtool` loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtool.adapters.layout import Layout, Site
    from memtool.adapters.linear import AdaptedLinear
    from memtool.adapters.mixing import Mixture
    from memtool.adapters.peft_files import read_peft, write_peft
    from memtool.adapters.values import AdapterValues
    from memtool.backbones import create_backbone
    from memtool.config import resolve
    from memtool.engine import Engine
    from memtool.errors import MemtoolError
    from memtool.experiments.run import demo, run
    from memtool.experiments.runs import runs
    from memtool.learning.learner import Learner
    from memtool.memories.hopfield import HopfieldMemory
    from memtool.memories.keyed import KeyedMemory
    from memtool.memory import Memory, load
    from memtool.methods.mira.method import Mira
    from memtool.methods.routed.method import Routed
    from memtool.sections import Settings
    from memtool.settings import Config
    from memtool.streams import create_stream

__version__ = "0.1.0"

_HOME = {
    "AdaptedLinear": "memtool.adapters.linear",
    "AdapterValues": "memtool.adapters.values",
    "Config": "memtool.settings",
    "Engine": "memtool.engine",
    "HopfieldMemory": "memtool.memories.hopfield",
    "KeyedMemory": "memtool.memories.keyed",
    "Layout": "memtool.adapters.layout",
    "Memory": "memtool.memory",
    "MemtoolError": "memtool.errors",
    "Mira": "memtool.methods.mira.method",
    "Learner": "memtool.learning.learner",
    "Mixture": "memtool.adapters.mixing",
    "Routed": "memtool.methods.routed.method",
    "Settings": "memtool.sections",
    "Site": "memtool.adapters.layout",
    "create_backbone": "memtool.backbones",
    "create_stream": "memtool.streams",
    "demo": "memtool.experiments.run",
    "load": "memtool.memory",
    "read_peft": "memtool.adapters.peft_files",
    "resolve": "memtool.config",
    "run": "memtool.experiments.run",
    "runs": "memtool.experiments.runs",
    "write_peft": "memtool.adapters.peft_files",
}

__all__ = [
    "AdaptedLinear",
    "AdapterValues",
    "Config",
    "Engine",
    "HopfieldMemory",
    "KeyedMemory",
    "Layout",
    "Learner",
    "Memory",
    "MemtoolError",
    "Mira",
    "Mixture",
    "Routed",
    "Settings",
    "Site",
    "__version__",
    "create_backbone",
    "create_stream",
    "demo",
    "load",
    "read_peft",
    "resolve",
    "run",
    "runs",
    "write_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memtool' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
