"""Which blocks of a memory are asked the same by every image, told from its store alone."""

from __future__ import annotations

from memtool.methods.mira.doctor import asked_the_same, blocks_in_names
from memtool.methods.mira.explain import blocks_asked_the_same
from memtool.methods.mira.method import Mira
from tests.methods.conftest import learn, small_config


def test_the_store_alone_names_the_blocks_that_the_model_has(adapted):
    seen_by_class_token = {
        "memory__scope": "block",
        "memory__token": "class",
        "consolidate__keys": "mean-query",
    }
    mira = learn(Mira.open(small_config(adapted, **seen_by_class_token), seed=0), each=False)
    found = asked_the_same(mira.workspace.store.view())
    assert found.blocks == blocks_asked_the_same(mira.snapshot()) == (0,)
    others = ",".join(map(str, mira.workspace.layout.blocks[1:]))
    assert (found.remedy or "").startswith(f"--set memory.blocks={others}, or ")


def test_a_memory_that_sees_all_is_asked_different_things(learned):
    assert asked_the_same(learned.workspace.store.view()).memories == ()


def test_blocks_are_numbered_where_names_are_one_list():
    vit = ["blocks.3.attn.qkv[q].lora_A", "blocks.10.mlp.fc1.lora_B", "blocks.3.mlp.fc1.lora_A"]
    assert blocks_in_names(vit) == (3, 10)
    assert blocks_in_names(["visual.resblocks.2.attn.lora_A"]) == (2,)
    assert blocks_in_names(["layer1.0.conv1.lora_A", "layer2.0.conv1.lora_A"]) is None
    assert blocks_in_names(["conv1.lora_A", "blocks.1.conv1.lora_A"]) is None
    assert blocks_in_names([]) is None
