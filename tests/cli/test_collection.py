"""import --base, consolidate, retrieve, generate and export, as somebody with a folder of LoRA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import inside
from tests.methods.test_collection import (
    PROMPTS,
    SHAPES,
    write_collection,
    write_prompts,
)
from tests.methods.test_collection_measured import write_texts

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)


def memtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MEMTOOL_")}
    own = {"XDG_CONFIG_HOME": str(folder / "user"), "MEMTOOL_CACHE": str(folder / "cache")}
    return inside(folder, environment | own | {"OMP_NUM_THREADS": "1"}, *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a collection was imported and consolidated."""
    folder = write_collection(tmp_path_factory.mktemp("collection"))
    write_texts(folder / "texts.jsonl", ("sums", "letters"))
    done = memtool(folder, "import", "adapters", "--base", "hf:model", "--prompts", "prompts.jsonl")
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()[1:]] == list(SHAPES)
    done = memtool(folder, "consolidate")
    assert done.returncode == 0, done.stderr
    assert not any(line.split("\t")[0] == "new" for line in done.stdout.splitlines())
    return folder


def test_a_prompt_names_its_adapter_and_gets_an_answer(place: Path) -> None:
    for name in SHAPES:
        done = memtool(place, "retrieve", "--prompt", PROMPTS[name][0], "-q")
        assert done.stdout.strip() == name, done.stderr
    asked = [PROMPTS[name][1] for name in SHAPES]
    lines = [json.dumps({"prompt": asked[0]}), *asked[1:]]
    (place / "asked.txt").write_text("\n".join(lines), encoding="utf-8")
    done = memtool(place, "generate", "--prompts", "asked.txt", "--most", "4", "--json")
    said = json.loads(done.stdout)
    assert said["schema"] == "memtool.generate"
    assert said["version"] == memtool(place, "log", "-q").stdout.split()[0]
    assert [answer["prompt"] for answer in said["answers"]] == asked
    assert [answer["weights"][0]["name"] for answer in said["answers"]] == list(SHAPES)
    one = memtool(place, "generate", "--prompt", asked[0], "--most", "4", "-q")
    assert one.stdout.rstrip("\n") == said["answers"][0]["text"]
    told = memtool(place, "generate", "--prompt", asked[0], "--task", "sums", "--json")
    assert json.loads(told.stdout)["answers"][0]["weights"] == [{"name": "sums", "weight": 1.0}]


def test_the_files_and_the_mixture_come_out(place: Path) -> None:
    assert memtool(place, "export", "--out", "back").returncode == 0
    for name in SHAPES:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            original = (place / "adapters" / name / file).read_bytes()
            assert (place / "back" / name / file).read_bytes() == original
    done = memtool(place, "retrieve", "--prompt", "after a comes", "--out", "mixture")
    assert done.returncode == 0, done.stderr
    assert (place / "mixture" / "adapter_model.safetensors").is_file()
    assert memtool(place, "verify").returncode == 0
    assert "shapes of their own\t3 adapters" in memtool(place, "show").stdout


def test_it_is_measured_on_texts_beside_peft(place: Path) -> None:
    words = ("eval", "--texts", "texts.jsonl", "--compare", "peft")
    done = memtool(place, *words, "--report", "r.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("method\tletters\tsums\tmean ↓\n")
    assert "Loss, nats per answer token" in done.stderr
    assert "tasks" not in done.stderr
    lines = [line.split("\t")[0] for line in done.stdout.splitlines()]
    for label in ("memory, mira (1 of 3 adapters distract)", "frozen model", "PEFT cat (weight"):
        assert any(line.startswith(label) for line in lines), done.stdout
        assert label in (place / "r.html").read_text(encoding="utf-8")
    assert any("PEFT Arrow, not possible: ranks 1, 2, 3 and 4" in line for line in lines)
    record = json.loads(memtool(place, *words, "--json").stdout)
    losses = {row["id"]: row["metrics"].get("loss.final") for row in record["metrics"]["rows"]}
    assert losses["peft-oracle"] == pytest.approx(losses["oracle"], abs=1e-4)
    assert losses["peft-cat"] == pytest.approx(losses["uniform"], abs=1e-4)
    assert losses["peft-ties"] is None


def test_a_collection_is_halved_on_texts_of_ones_own(place: Path) -> None:
    done = memtool(place, "bisect", "--texts", "texts.jsonl", "--drop", "0.2")
    assert done.returncode == 1, done.stderr
    assert "it never rose by 0.2 nats" in done.stderr


def test_images_have_no_rival(tmp_path: Path) -> None:
    done = memtool(tmp_path, "eval", "--compare", "peft")
    assert done.returncode == 2, done.stderr
    assert "method mira over texts" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("generate",), 2, "one of --prompt and --prompts"),
        (("generate", "--prompt", " "), 2, "a prompt is empty"),
        (("generate", "--prompts", "nowhere.txt"), 3, "no file nowhere.txt"),
        (("generate", "--prompt", "x", "--task", "poems"), 3, "no adapter of task 'poems'"),
        (("import", "adapters", "--prompts", "x", "--store", "new"), 2, "--base hf:MODEL"),
        (("import", "nowhere", "--base", "hf:model"), 3, "no adapter in nowhere"),
        (
            ("import", "adapters/sums", "--store", "new"),
            2,
            "adapters/sums is a LoRA of a language model, '",
        ),
        (("import", "adapters", "--store", "new"), 2, "memtool import adapters --base hf:/"),
        (("write", "adapters/sums"), 2, "'base_model.model.model.layers.0."),
        (("bisect", "--drop", "1"), 2, "brings no texts to be measured on"),
        (("generate", "--prompt", "x", "--store", "none"), 3, "memtool import DIR --base MODEL"),
        (("import", "adapters", "--base", "hf:model", "--task", "1"), 2, "DIR:TASK"),
        (("eval",), 2, "of eval and bisect --texts FILE"),
        (("import", "adapters", "--task", "1", "--prompts", "x"), 2, "try: --base hf:model"),
        (("eval", "--texts", "nowhere.jsonl"), 3, "no file nowhere.jsonl"),
        (("eval", "--texts", "prompts.jsonl"), 2, '"answer"'),
        (("eval", "--texts", "texts.jsonl", "peft"), 2, "peft without --compare"),
        (("eval", "--texts", "texts.jsonl", "--compare", "pfet"), 2, "did you mean 'peft'"),
    ],
)
def test_what_is_refused(place: Path, words: tuple[str, ...], code: int, said: str) -> None:
    done = memtool(place, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_adapter_gets_the_name_of_a_task_and_is_forgotten_by_it(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copytree(place / "adapters" / "sums", tmp_path / "lora")
    done = memtool(tmp_path, "import", "lora:addition", "--base", "hf:model")
    assert done.returncode == 0, done.stderr
    (line,) = memtool(tmp_path, "ls", "--json").stdout.splitlines()
    (adapter,) = json.loads(line)["adapters"]
    assert (adapter["name"], adapter["meta"]["task_name"]) == ("lora", "addition")
    assert memtool(tmp_path, "forget", "addition", "--yes").returncode == 0
    assert memtool(tmp_path, "ls", "-q").stdout == ""


def test_images_are_not_answered(tmp_path: Path) -> None:
    done = memtool(tmp_path, "generate", "--prompt", "x")
    assert done.returncode in (2, 3)
    assert "language model" in done.stderr or "no memory" in done.stderr


def test_two_collections_become_one(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copytree(place / "adapters", tmp_path / "adapters")
    for store, name in (("a", "letters"), ("b", "sums")):
        write_prompts(tmp_path / f"{name}.jsonl", {name: PROMPTS[name]})
        files = (f"adapters/{name}", "--prompts", f"{name}.jsonl", "--store", store)
        done = memtool(tmp_path, "import", *files, "--base", "hf:model")
        assert done.returncode == 0, done.stderr
    done = memtool(tmp_path, "merge", "b", "--store", "a")
    assert done.returncode == 0, done.stderr
    assert "next: memtool consolidate --store a" in done.stderr
    assert memtool(tmp_path, "consolidate", "--store", "a").returncode == 0
    # A new memory knows its model from the one that it is of.
    assert memtool(tmp_path, "merge", "b", "--store", "c", "-q").returncode == 0
    assert memtool(tmp_path, "merge", "a", "--store", "c", "-q").returncode == 0
    assert memtool(tmp_path, "consolidate", "--store", "c").returncode == 0
    for store in ("a", "c"):
        for name in ("letters", "sums"):
            done = memtool(
                tmp_path, "retrieve", "--prompt", PROMPTS[name][0], "-q", "--store", store
            )
            assert done.stdout.strip() == name, done.stderr


def test_a_memory_of_another_model_is_said_by_names(place: Path, tmp_path: Path) -> None:
    for name in ("model", "other"):
        shutil.copytree(place / "model", tmp_path / name)
    shutil.copytree(place / "adapters" / "sums", tmp_path / "sums")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert memtool(tmp_path, "import", "sums", "--base", "hf:model").returncode == 0
    # The memory knows its model: the next need not say it.
    shutil.copytree(place / "adapters" / "letters", tmp_path / "letters")
    write_prompts(tmp_path / "prompts.jsonl", {name: PROMPTS[name] for name in ("letters", "sums")})
    done = memtool(tmp_path, "import", "letters:words", "--prompts", "prompts.jsonl", "-q")
    assert done.returncode == 0, done.stderr
    done = memtool(tmp_path, "import", "letters:words")
    assert (done.returncode, "note: --base hf:model, the model of" in done.stderr) == (0, True)
    listed = json.loads(memtool(tmp_path, "ls", "--json").stdout)["adapters"]
    assert sorted(adapter["name"] for adapter in listed) == ["letters", "sums"]
    done = memtool(tmp_path, "import", "sums", "--base", "hf:other")
    assert done.returncode == 2
    assert "the memory 'memory' is of hf:model (" in done.stderr
    assert "are said to be of hf:other (" in done.stderr
    assert "try: --base hf:model, or another --store" in done.stderr
    assert memtool(tmp_path, "import", "sums", "--base", "hf:other", "--store", "b").returncode == 0
    done = memtool(tmp_path, "merge", "b")
    assert done.returncode == 2
    assert "the other memory is of hf:other (" in done.stderr


def test_what_an_import_says_of_prompts_alone(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copytree(place / "adapters" / "sums", tmp_path / "lora")
    line = json.dumps({"adapter": "lora", "prompt": "1 and 1 is"})
    (tmp_path / "some.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text(line.replace("1 and 1 is", "  "), encoding="utf-8")
    base = ("--base", "hf:model")
    assert memtool(tmp_path, "import", "lora:maths", *base).returncode == 0
    done = memtool(tmp_path, "import", "lora", *base, "--prompts", "some.jsonl")
    assert "other prompts than before of lora: memtool consolidate" in done.stderr
    assert "nothing new" not in done.stderr
    done = memtool(tmp_path, "import", "lora", *base, "--prompts", "some.jsonl")
    assert "nothing new to write; in memory already: lora" in done.stderr
    done = memtool(tmp_path, "import", "lora", *base, "--prompts", "empty.jsonl")
    assert done.returncode == 2
    assert "empty.jsonl, line 1: the prompt of 'lora' is empty" in done.stderr
    for verb in ("ls", "show"):
        said = memtool(tmp_path, verb).stdout
        header = next(line for line in said.splitlines() if line.startswith("id\t"))
        row = next(line for line in said.splitlines() if "\tlora\t" in line)
        named = dict(zip(header.split("\t"), row.split("\t"), strict=True))
        assert (named["task"], named["task name"]) == ("1", "maths")
