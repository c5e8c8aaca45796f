"""A small LLaVA on three tasks of questions about pictures, from nothing to the figures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.vision_language import WITHIN, measured, opened, write_model, write_stream


def test_the_mixture_is_below_the_frozen_model_and_near_the_oracle(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_stream(tmp_path / "stream", trained=96, tested=24)
    found = measured(opened(tmp_path, **{"train.epochs": 6}))
    cases = {case["name"]: case["value"] for case in found["cases"]}
    frozen = cases["frozen model: nats per answer token"]
    oracle = cases["oracle adapter, task given: nats per answer token"]
    memory = cases["memory, mira: nats per answer token"]
    assert oracle < frozen - 1  # the adapters learned
    assert memory < frozen
    assert memory <= oracle + WITHIN
    # What is said of the colour goes by the picture.
    assert cases["colour: nats with its own picture, less those with another"] < -0.1
    assert found["passed"]
