"""The settings that a memory was made with, as its versions hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memtool.errors import ConfigError, CorruptError
from memtool.sections import as_meant

if TYPE_CHECKING:
    from memtool.settings import Config
    from memtool_stores import MemoryStore

_OF_THE_MACHINE = ("store", "lock_timeout", "runs", "baselines", "limits", "engine")
"""Settings and sections that say where and how to work, not what the memory is."""

ALSO = ("engine.precision",)
"""The number format that a memory was measured in is its own, whatever the machine."""


def remembered(store: MemoryStore, version: str = "HEAD") -> dict[str, Any]:
    """Settings by dotted key, of the newest version up to this one that says them; {} for none.

    Those of its method are among them, whoever's method it is. Raises CorruptError for what is no
    configuration, and the errors of the store.
    """
    for one in store.log(version):
        said = one.metadata.get("configuration")
        if said is None:
            continue
        if not isinstance(said, Mapping):
            raise CorruptError(
                f"version {one.id} of {store.url} says no configuration", expected="a JSON object"
            )
        found = {
            key: as_meant(value) if key.endswith(".similarity") else value
            for key, value in _flat(said)
            if _is_of_a_memory(key)
        }
        seed = one.metadata.get("seed")
        if isinstance(seed, int) and not isinstance(seed, bool):
            found["seed"] = (seed,)
        # What the adapters fit is said once for all versions, whatever a configuration says.
        layout = store.space.layout
        found |= {
            "backbone.name": store.space.backbone.name,
            "backbone.targets": layout.targets,
            "adapter.rank": layout.rank,
            "adapter.alpha": layout.alpha,
        }
        return found
    return {}


def carried_on(store: MemoryStore, version: str = "HEAD") -> dict[str, Any]:
    """What a version says that is made without settings: those of the newest before it that has.

    So that it stays in the memory when older versions go. Raises the errors of the store.
    """
    said = (one.metadata for one in store.log(version) if "configuration" in one.metadata)
    newest = next(said, {})
    return {name: newest[name] for name in ("configuration", "seed") if name in newest}


_OF_THE_CUT = (
    *("source", "setting", "order", "classes_per_task", "splits"),
    *("train_per_task", "shots", "validation", "seed", "test_seed"),
)
"""Settings of a stream that decide what is learned from and what is held back."""


def require_held_back(
    store: MemoryStore,
    config: Config,
    version: str = "HEAD",
    *,
    asked: str = "--split validation",
) -> None:
    """Raise ConfigError where a memory may have learned from what is measured as validation.

    What it held back follows from the settings of its stream: those must be in force. `asked` is
    what is asked for, in words.
    """
    made_with = remembered(store, version)
    here = config.recorded()["stream"]
    for name in _OF_THE_CUT:
        then, now = made_with.get(f"stream.{name}", here[name]), here[name]
        if then != now:
            raise ConfigError(
                f"{asked} with stream.{name} {now}: the memory was made with {then}, "
                "and may have learned from these samples",
                expected=f"stream.{name} {then}",
                remedy="the same without it, or a memory that was made with it",
            )


def _is_of_a_memory(key: str) -> bool:
    return key in ALSO or key.partition(".")[0] not in _OF_THE_MACHINE


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A configuration by dotted key; a section holds no others."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", one) for inner, one in value.items())
        else:
            yield name, value
