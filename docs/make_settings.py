"""Write docs/settings.md from the models of memtool.settings: `python docs/make_settings.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memtool.config import presets, resolve
from memtool.sections import SECTIONS, owners_of
from memtool.settings import Config, choices, get, keys

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

<!-- Made by `python docs/make_settings.py` from the models: do not edit by hand. -->

A setting has a dotted key. A setting can be given in three ways:

```bash
memtool consolidate --set memory.beta=2           # on the command line
export MEMTOOL_MEMORY__BETA=2                     # as a variable: MEMTOOL_, and __ for the dot
memtool init --method mira                        # in memtool.yaml: a file with every setting
memtool config show --origin                      # what is in force, and where each value is from
```

Precedence, highest first: command line, `MEMTOOL_*` variables, `--config FILE`, `memtool.yaml` in
the working directory, the user's file, the preset, the default. `none` means no value; several
values are separated by commas. An unknown key or value is an error with a suggestion.

Four variables are no settings: `MEMTOOL_DATA` names the folder of the data sets, `MEMTOOL_CACHE`
the folder of decoded images and values, `MEMTOOL_VLLM_STORES` the memories that vLLM serves
adapters of, and `MEMTOOL_API_KEY` is the key of `memtool serve`.

The sections of a method are there only where that method is chosen: elsewhere they are passed over
on the command line and in variables, with a note, and are an error in a file, unless the file names
a method that has them.
"""

FIRST = (
    "method",
    "store",
    "runs",
    "seed",
    "baselines",
    "backbone.name",
    "backbone.weights",
    "stream.source",
    "stream.setting",
    "stream.classes_per_task",
    "adapter.rank",
    "train.epochs",
    "train.lr",
    "head.kind",
    "engine.device",
)
"""What most experiments set."""

OTHERS = """\
## Methods of other packages

`method`, `baselines`, `backbone.name` and the separations also take names of installed packages,
`package.module:Class` and `path/to/file.py:Class`: see
[a method of your own](your-own-method.md). A class with the steps of a method (`open`, `adapt`,
`write`, `consolidate`, `retrieve`, `evaluate`) is one. Its `Settings` are a section of its name:
`nearest_mean.sharpness` is then a key as any other, with `--set`, as the variable
MEMTOOL_NEAREST_MEAN__SHARPNESS, in a file that `--config` names and in `memtool config show`.
"""


def page() -> str:
    """The whole page as Markdown."""
    shared = {key: field for key, field in keys().items() if not owners_of(key.partition(".")[0])}
    parts = [HEAD, f"## The fifteen that matter\n\n{_table(FIRST, DEFAULT)}"]
    for section in dict.fromkeys(key.rpartition(".")[0] for key in shared):
        inside = [key for key in shared if key.rpartition(".")[0] == section and key not in FIRST]
        title = f"## {section}\n\n{_about(section, DEFAULT)}" if section else "## The experiment"
        parts.append(f"{title}\n\n{_table(inside, DEFAULT)}")
    for section in dict.fromkeys(name for sections in SECTIONS.values() for name in sections):
        owners = owners_of(section)
        config = Config(method=owners[0])
        inside = [key for key in keys(owners[0]) if key.startswith(f"{section}.")]
        whose = ("method " if len(owners) == 1 else "methods ") + " and ".join(owners)
        title = f"## {section}: {whose}\n\n{_about(section, config)}"
        parts.append(f"{title}\n\n{_table(inside, config)}")
    return "\n".join([*parts, OTHERS, _presets()])


DEFAULT = Config()


def _table(wanted: Iterable[str], config: Config) -> str:
    """The settings with their defaults and what they mean."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for key in wanted:
        words = ", ".join(f"`{word}`" for word in choices(key))
        meaning = f"{keys()[key].description}" + (f": {words}" if words else "")
        lines.append(f"| `{key}` | {_shown(get(config, key))} | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


def _about(section: str, config: Config) -> str:
    return str(type(get(config, section)).__doc__).strip().partition("\n")[0]


def _presets() -> str:
    """What every preset changes."""
    lines = ["## Presets", "", "`--preset NAME`; only what differs from the defaults is listed."]
    for preset in presets():
        config = resolve(preset=preset.name, ambient=False).config
        defaults = Config(method=config.method)
        lines += ["", f"**{preset.name}**: {_cell(preset.summary)} `{preset.launch}`", ""]
        changed = [key for key in keys(config.method) if get(config, key) != get(defaults, key)]
        changed = ["method"] * (config.method != DEFAULT.method) + changed
        lines += [f"- `{key}`: {_shown(get(config, key))}" for key in changed]
        lines += ["- no changes"] * (not changed)
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "`" + ",".join(str(part) for part in value) + "`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
