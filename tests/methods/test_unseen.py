"""Domain generalisation: keys by class and several adapters a domain work there, or say why not."""

from __future__ import annotations

import pytest

from memtool.errors import ConfigError
from memtool.methods.mira.method import Mira
from tests.methods.conftest import learn, small_config

DG = {
    "stream__setting": "dg",
    "stream__order": ("rot0", "rot30", "rot60"),
    "stream__held_out": "rot60",
    "stream__train_per_task": 60,
    "stream__test_per_task": 60,
    "adapter__warm_start": "none",
    "memory__scope": "block",
    "head__scope": "shared",
}
BY_CLASS = {"memory__keys_of": "class", "head__kind": "lda", "head__features": "recalled"}
LEARNED = {
    "consolidate__keys": "random",
    "consolidate__epochs": 3,
    "consolidate__value_lr": 1e-2,
    "head__kind": "shared",
}


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (BY_CLASS, (2, 10)),
        ({**LEARNED, "adapter__per_task": 5}, (10, 1)),
        ({**LEARNED, "memory__test_time": "entropy", "train__average": "half"}, (2, 1)),
    ],
)
def test_a_domain_that_nobody_saw_is_known_better_than_by_chance(settings, keys, tmp_path):
    mira = Mira.open(small_config(tmp_path, **DG, **settings), seed=0)
    learn(mira, 2, each=False)
    _, model, _ = mira.snapshot().consolidated()
    adapters, each = keys
    width = mira.workspace.backbone.dim + 1
    assert model.memory.keys().shape == (len(model.memory.blocks), adapters, each * width)
    (accuracy,) = mira.evaluate().row("memory").accuracy[-1]
    assert accuracy > 0.25  # of ten classes


def test_keys_by_class_do_not_learn_and_say_what_does(tmp_path):
    config = small_config(tmp_path, **DG, **BY_CLASS, consolidate__epochs=1)
    mira = Mira.open(config, seed=0)
    with pytest.raises(ConfigError, match="keys that learn") as told:
        mira.adapt("1")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert "--set memory.keys_of=task" in str(told.value)
    mended = config.memory.model_copy(update={"keys_of": "task"})
    learn(Mira.open(config.model_copy(update={"memory": mended}), seed=0), 2, each=False)
