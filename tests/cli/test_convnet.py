"""The five verbs on a small ConvNet with random weights, and its adapters as PEFT directories."""

from __future__ import annotations

from safetensors.torch import load_file

CONVNET = [
    *("--set", "backbone.name=timm:test_convnext", "--set", "backbone.weights=random"),
    *("--set", "backbone.targets=conv,fc1", "--set", "stream.train_per_task=30"),
    *("--set", "stream.test_per_task=20", "--set", "train.epochs=1"),
]


def test_five_verbs_on_a_convnet_and_its_adapters_in_and_out(memtool, tmp_path):
    for verb in (
        ["train-adapter", "--task", "1"],
        ["train-adapter", "--task", "2"],
        ["write"],
        ["consolidate"],
        ["retrieve", "--task", "2"],
        ["eval"],
        ["export", "--out", str(tmp_path / "out")],
    ):
        done = memtool(*verb, *CONVNET)
        assert done.returncode == 0, done.stderr
    (first, _) = sorted((tmp_path / "out").rglob("adapter_model.safetensors"))
    kernels = [tensor.shape for tensor in load_file(first).values() if tensor.ndim == 4]
    assert kernels
    assert memtool("verify").returncode == 0
