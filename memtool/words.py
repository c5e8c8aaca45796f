"""Which words somebody may have meant who wrote one that is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

SYNONYMS = {
    "gpu": ("cuda", "mps"),
    "nvidia": ("cuda",),
    "metal": ("mps",),
    "apple": ("mps",),
    "float32": ("fp32",),
    "float": ("fp32",),
    "32": ("fp32",),
    "bfloat16": ("bf16",),
    "half": ("bf16",),
    "fp16": ("bf16",),
    "float16": ("bf16",),
    "int4": ("4bit",),
    "4": ("4bit",),
    "qkv": ("q,k,v",),
    "qv": ("q,v",),
    "attn": ("q,k,v,proj",),
    "attention": ("q,k,v,proj",),
    "mlp": ("fc1,fc2",),
    "ffn": ("fc1,fc2",),
    "center": ("centre",),
    "stretch": ("squash",),
    "resize": ("squash",),
    "letterbox": ("pad",),
    "fit": ("train-adapter", "run"),
    "learn": ("train-adapter", "run"),
    "add": ("write", "import"),
    "save": ("write", "export"),
    "commit": ("write",),
    "test": ("eval",),
    "evaluate": ("eval",),
    "list": ("ls",),
    "history": ("log",),
    "status": ("doctor", "ls"),
    "check": ("verify", "doctor"),
    "fsck": ("verify",),
    "recall": ("retrieve",),
    "undo": ("rollback",),
    "reset": ("rollback",),
    "revert": ("rollback",),
    "delete": ("forget",),
    "remove": ("forget",),
    "rm": ("forget",),
    "copy": ("clone",),
    "new": ("init",),
    "settings": ("config",),
    "upgrade": ("migrate",),
    "prune": ("gc",),
}
"""What a word of other programs is called here; `q,k,v` are several words at once."""

_SEPARATORS = re.compile(r"[-_.:/@ ]")


def near(given: str, known: Iterable[str]) -> list[str]:
    """The known words that `given` may stand for, best first: none for none.

    A synonym counts before everything, then all that begin with the word, then all that resemble
    it as much as the best of them does, whole or by their first part.

    >>> near("gpu", ["cpu", "cuda"]), near("mira", ["mira-dg", "mira-dil", "moram"])
    (['cuda'], ['mira-dg', 'mira-dil'])
    >>> near("trian", ["pretrain", "train-adapter"])
    ['train-adapter']
    """
    names = list(dict.fromkeys(known))
    word = given.strip().casefold()
    meant = [one for one in SYNONYMS.get(word, ()) if all(part in names for part in one.split(","))]
    if meant:
        return meant
    folded = [(name, name.casefold()) for name in names]
    if same := [name for name, lower in folded if lower == word]:
        return same
    if len(word) > 1 and (family := [name for name, lower in folded if lower.startswith(word)]):
        return family

    letters = [name for name in names if len(name) == 1 and name in word]
    if len(letters) == len(word) > 1:  # several words of one letter, written as one
        return [",".join(letters)]

    def likeness(name: str) -> float:
        parts = [name, *_SEPARATORS.split(name)[:1]]
        return max(difflib.SequenceMatcher(None, part, word).ratio() for part in parts)

    scores = {name: likeness(lower) for name, lower in folded}
    best = max(scores.values(), default=0.0)
    if best >= 0.5:
        return [name for name in names if scores[name] == best]
    return []


def either(words: Sequence[str]) -> str:
    """`"'a', 'b' or 'c'"`."""
    *most, last = [repr(one) for one in words]
    return f"{', '.join(most)} or {last}" if most else last
