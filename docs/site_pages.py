"""What the site has beside the pages of this folder: README, CONTRIBUTING, CHANGELOG, the API.

A hook of mkdocs (`make docs`). Links of a page to files that are no page of the site, such as a
model card, become the path of the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
"""Pages beside this folder, and what they are called on the site."""

API = {
    "memtool": ("memtool", ["memtool.memory", "memtool.config", "memtool.workspace"]),
    "streams": ("Streams", ["memtool.streams", "memtool.streams.task"]),
    "adapters": ("Adapters", ["memtool.adapters.layout", "memtool.adapters.mixing"]),
    "memories": ("Memories", ["memtool.memories.similarity", "memtool.memories.hopfield"]),
    "evaluation": ("Evaluation", ["memtool.evaluation.metrics", "memtool.evaluation.record"]),
    "store": ("Store", ["memtool_stores.store"]),
    "errors": ("Errors", ["memtool_stores.errors", "memtool.errors"]),
}
"""Pages of the API: title, and the modules whose docstrings they show."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that do not lie in this folder."""
    for source, name in TOP.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_moved(text)))
    for name, (title, modules) in API.items():
        shown = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=f"# {title}\n\n{shown}\n"))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave the site into what they name."""
    del config
    here = Path(page.file.src_uri).parent

    def lead(found: re.Match[str]) -> str:
        to = found["to"]
        if re.match(r"[a-z]+:|#", to):
            return found[0]
        path, hash_, anchor = to.partition("#")
        outside = path.removeprefix("../")
        if outside in TOP and path.startswith("../"):
            return f"[{found['text']}]({TOP[outside]}{hash_}{anchor})"
        if files.get_file_from_path((here / path).as_posix()) is not None:
            return found[0]
        return f"{found['text']} (`{outside}`)" if outside not in found["text"] else found["text"]

    return _LINK.sub(lead, markdown)


def _moved(text: str) -> str:
    """A page of the top folder, its links seen from this one."""

    def lead(found: re.Match[str]) -> str:
        to = found["to"]
        path, hash_, anchor = to.partition("#")
        return f"[{found['text']}]({TOP.get(path, path).removeprefix('docs/')}{hash_}{anchor})"

    return _LINK.sub(lead, text)
