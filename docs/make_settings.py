"""Write docs/settings.md from the models of memtool.config: `python docs/make_settings.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memtool.config import Config, choices, find_preset, get, keys, presets, resolve

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

<!-- Made by `python docs/make_settings.py` from memtool/config.py: do not edit by hand. -->

A setting has a dotted key. A setting can be given in three ways:

```bash
memtool consolidate --set memory.beta=2           # on the command line
export MEMTOOL_MEMORY__BETA=2                     # as a variable: MEMTOOL_, and __ for the dot
memtool init                                      # in memtool.yaml: a file with every setting
memtool config show --origin                      # what is in force, and where each value is from
```

Precedence, highest first: command line, `MEMTOOL_*` variables, `--config FILE`, `memtool.yaml` in
the working directory, the user's file, the preset, the default. `none` means no value; several
values are separated by commas. An unknown key or value is an error with a suggestion.

Two variables are no settings: `MEMTOOL_DATA` names the folder of the data sets, `MEMTOOL_CACHE` the
folder of decoded images and values.
"""


def page() -> str:
    """The whole page as Markdown."""
    defaults = Config()
    sections: dict[str, list[str]] = {}
    for key, field in keys().items():
        section = key.rpartition(".")[0]
        words = ", ".join(f"`{word}`" for word in choices(key))
        meaning = f"{field.description}: {words}" if words else f"{field.description}"
        row = f"| `{key}` | {_shown(get(defaults, key))} | {_cell(meaning)} |"
        sections.setdefault(section, []).append(row)
    parts = [HEAD]
    for section, rows in sections.items():
        title = f"## {section}\n\n{_about(section)}" if section else "## The experiment"
        table = "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])
        parts.append(f"{title}\n\n{table}\n")
    parts.append(_presets(defaults))
    return "\n".join(parts)


def _about(section: str) -> str:
    return str(type(get(Config(), section)).__doc__).strip().partition("\n")[0]


def _presets(defaults: Config) -> str:
    """What every preset changes."""
    lines = ["## Presets", "", "`--preset NAME`; only what differs from the defaults is listed."]
    for preset in presets():
        config = resolve(preset=find_preset(preset.name).name, ambient=False).config
        lines += ["", f"**{preset.name}**: {_cell(preset.summary)} `{preset.launch}`", ""]
        changed = [key for key in keys() if get(config, key) != get(defaults, key)]
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
