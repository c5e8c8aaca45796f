"""What the package `peft` makes of the adapters of a memory: its merges, and Arrow.

    merges   one adapter for all prompts (`add_weighted_adapter`): cat, linear, ties, dare_ties
    Arrow    every token chooses adapters by directions of their own, without training
    oracle   the adapter of the task, which is to be worth what it is worth here

The model is that of `transformers`, with the adapters as files; texts, batches, precision and
metrics are those of the memory. What PEFT leaves open is the best of a small grid on validation
texts; without any it is the first of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memtool.adapters.peft_tensors import WEIGHTS_NAME, place_of, tensor_name
from memtool.backbones.answering import without_answers
from memtool.backbones.causal_lm import PAD, CausalLM, EncodedTexts, model_source, without_bars
from memtool.backbones.pictured import reads_pictures
from memtool.devices import in_float32
from memtool.errors import ConfigError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.methods.export import export_peft
from memtool.methods.records import task_of
from memtool.methods.routed.memory import RoutedMemory
from memtool.settings import BackboneSettings
from memtool.streams.task import Task, spread
from memtool.workspace import Workspace

MERGES = ("cat", "linear", "ties", "dare_ties")
"""Kinds of PEFT's merges that are measured."""

TUNED = 20
"""Validation texts of a task that settings are chosen on."""

Choice: TypeAlias = Mapping[str, float]
"""Settings of a merge or of Arrow, by the names that PEFT gives them."""


def require_peft(settings: BackboneSettings) -> None:
    """Raise ConfigError where the package is not installed, or its model would be another."""
    if settings.quantise is not None:
        raise ConfigError(
            f"--compare peft with backbone.quantise {settings.quantise}, which PEFT's model is not",
            expected="the weights as they are",
            remedy="--set backbone.quantise=none",
        )
    if reads_pictures(model_source(settings)):
        raise ConfigError(
            f"--compare peft with {settings.name}, a model of images and text",
            expected="a model of text alone",
            remedy="leave --compare peft out",
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--compare peft needs the package peft, which is not installed",
            remedy="pip install peft",
        ) from error


class PeftLM:
    """A model of `transformers`, answered with as with a `CausalLM`; nothing is recalled."""

    def __init__(self, lm: CausalLM, model: Any) -> None:
        """`lm` is the same model here: it cuts texts into tokens."""
        self.lm, self.model = lm, model
        self.encode, self.decode, self.device = lm.encode, lm.decode, lm.device

    def answer_loss(self, tokens: Tensor, answers: Tensor, recall: None = None) -> Tensor:
        """As `CausalLM.answer_loss`."""
        del recall
        most = int(answers.max()) + 1
        with torch.autocast(tokens.device.type, enabled=False):  # PEFT casts where it has to
            scores = self.model(**_asked(tokens), logits_to_keep=most).logits[:, :-1]
        said = (tokens != without_answers(tokens, answers))[:, 1 - most :]
        picked = scores[said]
        return self.lm.answer_losses(in_float32(picked), tokens, answers)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, recall: None = None, *, most: int | None = None, beams: int = 1
    ) -> list[list[int]]:
        """As `CausalLM.generate`."""
        from transformers import GenerationConfig

        del recall
        ends = list(self.lm.ends)
        self.model.generation_config = GenerationConfig(
            do_sample=False, num_beams=beams, eos_token_id=ends, pad_token_id=ends[0]
        )
        asked = {name: one for name, one in _asked(tokens).items() if name != "position_ids"}
        most = self.lm.answer_tokens if most is None else most
        with torch.autocast(tokens.device.type, enabled=False):
            said = self.model.generate(**asked, max_new_tokens=most)[:, tokens.shape[1] :]
        return [self.lm.ended(row) for row in said.tolist()]


def _asked(tokens: Tensor) -> dict[str, Tensor]:
    """Tokens (b, n), padded on the left, as `transformers` takes them."""
    real = tokens != PAD
    return {
        "input_ids": tokens.clamp_min(0),
        "attention_mask": real.long(),
        "position_ids": (real.cumsum(1) - 1).clamp_min(0),
    }


class PeftAdapters:
    """Adapters in PEFT folders over the model of a workspace, as `peft` and `transformers` have it.

    The model is read a second time, and stays beside that of the workspace; the adapters are all
    loaded at once. What PEFT cannot do is a ValueError.
    """

    def __init__(self, work: Workspace, folders: Sequence[Path]) -> None:
        self.work = work
        self.folders = sorted(folders, key=_has_layers_of_its_own)
        self._base = load_base(work)
        self._model: Any = None

    def __len__(self) -> int:
        return len(self.folders)

    @contextmanager
    def alone(self, *names: str) -> Iterator[PeftLM]:
        """The model under the adapters of these names, each of the same weight."""
        places = [place for place, folder in enumerate(self.folders) if folder.name in names]
        if len(places) == 1:
            model = self._loaded()
            model.set_adapter(f"a{places[0]}")
            yield PeftLM(self.work.backbone, model)
        else:
            with self._merge(places, "cat", 1 / len(places)) as lm:
                yield lm

    @contextmanager
    def merged(self, kind: str, weight: float, **density: float) -> Iterator[PeftLM]:
        """The model under one adapter that PEFT makes of all, each of the same weight."""
        if kind != "cat":
            _require_one_rank(self._loaded())
        with self._merge(range(len(self)), kind, weight, **density) as lm:
            yield lm

    @contextmanager
    def arrow(self, top_k: float, router_temperature: float) -> Iterator[PeftLM]:
        """The model under PEFT's Arrow."""
        try:
            from peft import ArrowConfig, create_arrow_model
        except ImportError as error:
            raise ValueError("this version of peft has no Arrow, 0.18 has") from error
        _require_one_rank(self._loaded())
        names = [f"a{place}" for place in range(len(self))]
        layers = _adapted(self._model, names)
        if any(len(layer.lora_A) < len(self) for layer in layers):
            raise ValueError("layers that not all adapters have")
        if not all(isinstance(layer.base_layer, nn.Linear) for layer in layers):
            raise ValueError("transposed layers, as GPT-2 has them")
        self._base, self._model = self._model.unload(), None
        config = ArrowConfig(
            top_k=int(top_k), router_temperature=router_temperature, rng_seed=self.work.seed
        )
        model = create_arrow_model(self._base, [str(one) for one in self.folders], config)
        try:
            yield PeftLM(self.work.backbone, model.eval())
        finally:
            self._base = model.unload()

    def _loaded(self) -> Any:
        """The model with all adapters, a0, a1, … in the order of their folders."""
        from peft import PeftModel

        if self._model is None:
            model = PeftModel.from_pretrained(self._base, self.folders[0], adapter_name="a0")
            for place, folder in enumerate(self.folders[1:], start=1):
                model.load_adapter(folder, adapter_name=f"a{place}")
            self._model = model.eval()
        return self._model

    @contextmanager
    def _merge(
        self, places: Sequence[int], kind: str, weight: float, **density: float
    ) -> Iterator[PeftLM]:
        """The model under what PEFT makes of the adapters of some folders."""
        model, names = self._loaded(), [f"a{place}" for place in places]
        model.set_adapter("a0")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.work.seed)  # dare drops numbers at random
                model.add_weighted_adapter(
                    names, [weight] * len(names), "merged", combination_type=kind, **density
                )
            for module in _adapted(model, names):
                if "merged" not in module.lora_A:
                    raise ValueError("PEFT leaves out layers that the first adapter does not have")
                # All scalings are in the numbers by now; PEFT takes rslora over from the first.
                module.scaling["merged"] = 1.0
            model.set_adapter("merged")
            yield PeftLM(self.work.backbone, model)
        finally:
            model.set_adapter("a0")
            if "merged" in model.peft_config:
                model.delete_adapter("merged")


def _name_as_peft(folder: Path) -> None:
    """Give the tensors of an adapter the names that PEFT looks for; others it would leave out."""
    file = folder / WEIGHTS_NAME
    tensors = load_file(file)
    places = {name: place_of(name) for name in tensors}
    names = {name: tensor_name(*place) for name, place in places.items() if place is not None}
    if any(name != plain for name, plain in names.items()):
        save_file({names[name]: tensor for name, tensor in tensors.items()}, file)


@without_bars()
def load_base(work: Workspace) -> Any:
    """The model of a workspace as `transformers` has it, on the device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_source(work.config.backbone),
        dtype=work.dtype,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval().to(work.engine.device)


def _has_layers_of_its_own(folder: Path) -> bool:
    """Whether an adapter is in some layers alone: those of the first are all that a merge has."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(folder).layers_to_transform is not None


def _adapted(model: Any, names: Sequence[str]) -> list[Any]:
    """The layers that have any of these adapters."""
    return [one for one in model.modules() if any(n in getattr(one, "lora_A", ()) for n in names)]


def _require_one_rank(model: Any) -> None:
    """Raise ValueError for adapters of unlike ranks."""
    layers = _adapted(model, list(model.peft_config))
    ranks = sorted({len(one.weight) for layer in layers for one in layer.lora_A.values()})
    if len(ranks) > 1:
        raise ValueError(f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}")


# What is left open ------------------------------------------------------------------------------


def choices(kind: str, count: int) -> list[Choice]:
    """What is tried of a merge of so many adapters, or of "arrow"; the first one is the default."""
    shares = (1 / count, 0.1, 0.5)
    match kind:
        case "arrow":
            kept = dict.fromkeys(min(k, count) for k in (3, 1, count))
            return [{"top_k": k, "router_temperature": t} for k in kept for t in (1.0, 0.1, 10.0)]
        case "cat" | "linear":
            return [{"weight": weight} for weight in dict.fromkeys(shares)]
        case _:
            return [{"weight": w, "density": d} for w in (1.0, 0.5) for d in (0.5, 0.2)]


@dataclass(frozen=True, eq=False)
class Way:
    """One way of PEFT's to use all adapters: `asked(**choice)` is the model under it."""

    id: str
    label: str
    choices: Sequence[Choice]
    asked: Callable[..., AbstractContextManager[PeftLM]]

    def best(self, work: Workspace, texts: Sequence[EncodedTexts]) -> Choice:
        """The choice of the least mean loss on texts, those of each task together."""
        if not texts or len(self.choices) == 1:
            return self.choices[0]

        def loss(choice: Choice) -> float:
            with self.asked(**choice) as lm:
                answering = Answering(work, None, lm)
                return sum(answering.loss(some) for some in texts)

        return min(self.choices, key=loss)


def ways_of(adapters: PeftAdapters) -> list[Way]:
    """All ways that are measured."""
    count = len(adapters)
    merges = [
        Way(f"peft-{kind}", f"PEFT {kind}", choices(kind, count), partial(adapters.merged, kind))
        for kind in MERGES
    ]
    return [*merges, Way("peft-arrow", "PEFT Arrow", choices("arrow", count), adapters.arrow)]


# Rows -------------------------------------------------------------------------------------------


def peft_rows(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> list[Row]:
    """The rows of PEFT's ways to use the adapters of a memory, and of its oracle.

    Settings are chosen on the validation texts of the tasks, where there are some.
    """
    with TemporaryDirectory() as place:
        names = [record.name for record in memory.records]
        folders = export_peft(work, names, out=Path(place) / "adapters", version=memory.version)
        for folder in folders:
            _name_as_peft(folder)
        adapters = PeftAdapters(work, folders)
        texts = validation_of(work, tasks)
        oracle = _oracle(work, adapters, memory, tasks)
        return [*(_row(work, way, texts, tasks) for way in ways_of(adapters)), oracle]


def validation_of(work: Workspace, tasks: Sequence[Task]) -> list[EncodedTexts]:
    """Some validation texts of every task that has any."""
    some = [spread(task.validation, TUNED) for task in tasks if len(task.validation)]
    return [work.backbone.encode(one.prompts, one.answers) for one in some]


def _row(work: Workspace, way: Way, texts: Sequence[EncodedTexts], tasks: Sequence[Task]) -> Row:
    """The row of one way; without numbers where it is not possible, which its label says."""
    count = len(tasks)
    try:
        choice = way.best(work, texts)
        with way.asked(**choice) as lm:
            found = Answering(work, None, lm).scores(tasks, f"evaluate: {way.label}")
    except ValueError as error:  # of PEFT, and of what it would do without a word
        reason = f"not possible: {error}"
        matrix = AccuracyMatrix.empty([task.name for task in tasks])
        row = Row.measured(way.id, f"{way.label}, {reason}", "baseline", matrix)
        nothing = ((None,) * count,) * (count + 1)
        return row.model_copy(update={"loss": nothing, "undefined": {"loss.final": reason}})
    settings = ", ".join(f"{name} {value:.3g}" for name, value in choice.items())
    how = "chosen on validation texts" if texts else "defaults"
    label = f"{way.label} ({settings}: {how})"
    return answer_row(way.id, label, "baseline", tasks, {count: found})


def _oracle(
    work: Workspace, adapters: PeftAdapters, memory: RoutedMemory, tasks: Sequence[Task]
) -> Row:
    """The adapters of each task, in PEFT."""
    label = "oracle adapter, in PEFT"
    parts = []
    for task in tasks:
        names = [record.name for record in memory.records if task_of(record) == task.number]
        with adapters.alone(*names) as lm:
            stage = f"evaluate: {label}, {task.name}"
            parts.append(Answering(work, None, lm).scores([task], stage))
    return answer_row(
        "peft-oracle", label, "upper bound", tasks, {len(tasks): AnswerScores.joined(parts)}
    )
