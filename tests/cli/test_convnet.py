"""The five verbs on random ConvNets, their adapters out and in, and what is refused at once."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

SMALL = {
    "backbone.weights": "random",
    "stream.order": "upright,inverted",
    "stream.train_per_task": 30,
    "stream.test_per_task": 20,
    "train.epochs": 2,
    "train.batch_size": 10,
    "train.lr": 0.01,
    "engine.precision": "fp32",
}
CONVNETS = {
    "test_convnext": "conv,fc1",
    "resnet18": "conv1,conv2,downsample",
    "convnext_atto": "conv,fc1,fc2",
}


def variables(model: str, **more: str) -> dict[str, str]:
    """The settings of a trial as the environment has them, so that options may say otherwise."""
    named = {"backbone.name": f"timm:{model}", "backbone.targets": CONVNETS[model]}
    values = {**SMALL, **named, **more}
    return {f"MEMTOOL_{key.upper().replace('.', '__')}": str(v) for key, v in values.items()}


@pytest.mark.parametrize(
    "model",
    [
        "test_convnext",
        "resnet18",
        pytest.param("convnext_atto", marks=pytest.mark.slow),
    ],
)
def test_five_verbs_on_a_convnet_and_its_adapters_out_and_in(model, memtool, tmp_path):
    def done(*verb: str) -> str:
        said = memtool(*verb, **variables(model))
        assert said.returncode == 0, said.stderr
        return said.stdout

    for task in ("1", "2"):
        done("train-adapter", "--task", task)
    done("write")
    done("consolidate")
    found = json.loads(done("retrieve", "--task", "2", "--json"))
    weights = {one["name"]: one["coefficient"] for one in found["adapters"]}
    assert max(weights, key=weights.get) == "task-2-seed-0"
    (row,) = json.loads(done("eval", "--json"))["metrics"]["rows"]
    assert min(row["accuracy"][-1]) > 0.2  # ten digits, with the features of a random model
    done("export", "--out", str(tmp_path / "out"))
    first = tmp_path / "out" / "task-1-seed-0"
    tensors = load_file(first / "adapter_model.safetensors")
    assert 4 in {tensor.ndim for tensor in tensors.values()}
    assert all(bool(tensor.any()) for tensor in tensors.values())
    assert memtool("verify").returncode == 0

    beside = ["--store", "beside"]
    done("import", str(first), *beside)
    done("export", "--out", str(tmp_path / "again"), *beside)
    (again,) = (tmp_path / "again").rglob("adapter_model.safetensors")
    assert again.read_bytes() == (first / "adapter_model.safetensors").read_bytes()


REFUSED = {
    "memory.token=class": ("a backbone without class token", "--set memory.token=mean"),
    "backbone.targets=conv_dw": ("groups, and the rank is 4", "backbone.targets without this"),
    "backbone.targets=qkv": (
        "no target 'qkv'\n  expected: one of",
        "--set backbone.targets=fc1,fc2",
    ),
    "method=moram": ("atoms at stages.", "--method mira"),
    "memory.similarity=cosine": ("for similarity 'cosine'", "--set memory.similarity=scaled-dot"),
    "memory.key_bias=false": ("with memory.key_bias false", "--set memory.key_bias=true"),
    "consolidate.protect=dual-gpm": ("in closed form under --protect", "--protect freeze"),
}


@pytest.mark.parametrize("verb", [("run", "--dry-run"), ("train-adapter", "--task", "1")])
@pytest.mark.parametrize("asked", REFUSED)
def test_what_it_cannot_have_is_refused_before_anything_learns(asked, verb, memtool, here):
    said, cure = REFUSED[asked]
    setting, _, value = asked.partition("=")
    given = variables("test_convnext", **{setting: value})
    refused = memtool(*verb, **given)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert not [*here.iterdir()]
    assert cure in refused.stderr.partition("try: ")[2]
    if cure.startswith("--"):
        cured = memtool("run", "--dry-run", *cure.split(), **given)
        assert cured.returncode == 0, cured.stderr
