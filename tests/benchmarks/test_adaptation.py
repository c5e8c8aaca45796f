"""The benchmark of training runs on nano, and its sides agree."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import adaptation
from memtool.engine import Engine
from memtool.settings import BackboneSettings, EngineSettings


def test_one_pass_is_held_against_ten_trainings() -> None:
    engine = Engine(EngineSettings(device="cpu", precision="fp32"))
    nano = adaptation.subject("nano", BackboneSettings(), images=8, batch_size=4, epochs=1)
    counted = []
    for begin in (0, 2):
        ours, peft = adaptation.stage_one(replace(nano, begin=begin), engine, 1)
        assert "ten trainings / one pass" in ours["name"]
        assert "PEFT" in peft["name"]
        for case in (ours, peft):
            assert case["curves_differ"] < adaptation.CURVES_AGREE["fp32"]
        counted.append(ours["counted"])
    assert 1 < counted[0] < counted[1]  # what is before the first adapter is computed once


def test_tasks_in_one_pass_are_held_against_a_training_each() -> None:
    engine = Engine(EngineSettings(device="cpu", precision="fp32"))
    nano = adaptation.subject("nano", BackboneSettings(), images=8, batch_size=4, epochs=1)
    found = adaptation.several_tasks(nano, engine, 1, adapters=2)
    assert found["what"] == "five trainings / one pass"
    assert found["curves_differ"] < adaptation.CURVES_AGREE["fp32"]
    assert found["limit"] is None
    assert found["value"] > 0
