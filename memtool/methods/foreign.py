"""What must fit before an adapter from elsewhere is used: its kind, its model and its head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import PeftAdapter
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.errors import ConfigError, MemtoolError, MismatchError
from memtool.outside import is_file, is_folder, read_file, read_json
from memtool.tensor_bytes import read_arrays
from memtool_stores.printable import shown
from memtool_stores.tensorfile import read_header_of

if TYPE_CHECKING:
    from memtool.backbones.interface import FrozenModel
    from memtool.methods.exchange import ReadAdapter
    from memtool.methods.home import StoredModel

TrainedAs = Literal["adapter", "atoms"]
"""How an adapter acts on its input: whole, or by the ranks that each token chooses (MoRAM)."""


def require_trained_as(
    adapter: ReadAdapter, kind: TrainedAs, method: str, *, as_atoms: bool
) -> None:
    """An adapter is used as it was trained, unless another use is asked for by name.

    `kind` is what the memory of a method holds. Raises MismatchError, and ConfigError for atoms
    that are asked for where there are none.
    """
    if as_atoms and kind == "adapter":
        raise ConfigError(
            f"atoms under method {method}",
            expected="method moram, whose memory is made of atoms",
            remedy="the same without --as atoms, or with --method moram",
        )
    if adapter.trained_as == kind or as_atoms:
        return
    if kind == "atoms":
        raise MismatchError(
            f"{adapter.path} is a LoRA that acts whole on every token; as atoms each token would "
            "use a few of its ranks, which is another function",
            expected="an adapter that was trained with --method moram",
            remedy=f"memtool import {adapter.path} --as atoms, which says what is lost by it, or "
            "--method mira and another --store",
        )
    raise MismatchError(
        f"{adapter.path} holds atoms, of which each token uses a few; acting whole they would be "
        "another function",
        expected=f"an adapter that was trained with --method {method}",
        remedy="--method moram and another --store",
    )


def require_of_images(path: Path) -> None:
    """Raise ConfigError for a folder with a LoRA of a language model, or with folders of such.

    What cannot be read says so where it is read.
    """
    inside = [path, *sorted(path.glob("*"))] if is_folder(path) else []
    folder = next((one for one in inside if is_file(one / CONFIG_NAME)), None)
    if folder is None:
        return
    try:
        config = read_json(folder / CONFIG_NAME)
        header = read_header_of(folder / WEIGHTS_NAME)
    except MemtoolError:
        return
    named = next((t.name for t in header.tensors if _OF_A_LANGUAGE_MODEL.search(t.name)), None)
    said = config if isinstance(config, dict) else {}
    if named is None and said.get("task_type") != "CAUSAL_LM":
        return
    base = said.get("base_model_name_or_path")
    known = isinstance(base, str) and base
    raise ConfigError(
        f"{folder} is a LoRA of a language model"
        + (f", {shown(base)}" if known else "")
        + (f": it has {shown(named)}" if named else ": its task_type is CAUSAL_LM"),
        expected="--base, which says the model",
        remedy=f"memtool import {path} --base hf:{base if known else 'MODEL'}",
    )


_OF_A_LANGUAGE_MODEL = re.compile(r"(^|\.)model\.layers\.\d+\.")
"""How tensors of a decoder of transformers are named."""


def check_base_model(
    path: Path,
    found: PeftAdapter,
    trained_on: tuple[str | None, str | None],
    here: FrozenModel | StoredModel,
) -> tuple[str, ...]:
    """What is doubtful about the model that an adapter was made for: one sentence, or none.

    `trained_on` are name and hash of the backbone where the folder says them. Raises MismatchError
    for another hash than that of the backbone `here`.
    """
    name, sha256 = trained_on
    if sha256 is not None:
        if sha256 != here.sha256:
            raise MismatchError(
                f"{path} was trained on {name} ({sha256[:12]}…)",
                expected=f"{here.name} ({here.sha256[:12]}…)",
                remedy="--preset or --set backbone.name as it was trained with",
            )
        return ()
    base, revision = found.base_model, found.revision
    if revision is None and (base is None or _last_word(base) == _last_word(here.name)):
        return ()
    made_for = (base or "a model") + (f" at revision {revision}" if revision else "")
    return (
        f"{path} says that it was made for {made_for}; the backbone here is {here.name} "
        f"({here.sha256[:12]}…): on another model its numbers mean nothing",
    )


def _last_word(model: str) -> str:
    """A model's name without where it is from: `hf:google/gemma-2b` is `gemma-2b`."""
    return re.split(r"[:/\\]", model.rstrip("/"))[-1].lower()


def read_head(file: Path, shape: tuple[int, int]) -> bytes:
    """The head beside an adapter, of shape (classes, width), as the blob of a memory.

    Raises MismatchError for another shape, CorruptError for what is no head; and as `read_file`.
    """
    from safetensors.numpy import save

    data = read_file(file, "array_bytes")
    head = read_arrays(data, str(file), weight="c d", bias="c")
    found = head["weight"].shape
    if found != shape:
        raise MismatchError(
            f"{file}: a head of {found[0]} classes, {found[1]} wide",
            expected=f"{shape[0]} classes of the stream, {shape[1]} wide, as the backbone is",
            remedy="remove the file, to import the adapter without its head",
        )
    if any(array.dtype == "torch.bfloat16" for array in head.values()):  # numpy has no such type
        from memtool.methods.in_store import classifier_bytes, classifier_of

        return classifier_bytes(classifier_of(data, str(file)))
    return save({name: array.bits for name, array in head.items()})
