"""TreeLoRA: what it is without its term, its tree, its bandit, and what a step is drawn to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memtool.experiments.baselines import chosen_baselines
from memtool.learning.learner import Learner
from memtool.methods import open_method
from memtool.methods.baselines.in_turn import in_turn
from memtool.methods.baselines.tree_lora import Node, TreeLora
from memtool.workspace import Workspace
from tests.methods.conftest import small_config
from tests.methods.facts import work_of, write_facts
from tests.methods.test_rivals import CIL, FEW, assert_equal_parameters, images_of, learned


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three tasks of four, four and two digits."""
    return Workspace(small_config(tmp_path_factory.mktemp("tree"), **FEW, **CIL), seed=0)


@pytest.fixture(scope="module")
def sequential(work: Workspace) -> Learner:
    found = learned(Learner, work, 2)
    assert isinstance(found, Learner)
    return found


def test_with_one_task_it_is_sequential(work: Workspace) -> None:
    assert_equal_parameters(learned(TreeLora, work, 1), learned(Learner, work, 1))


def test_without_its_term_it_is_sequential(work: Workspace, sequential: Learner) -> None:
    assert_equal_parameters(learned(TreeLora, work, 2, strength=0.0), sequential)


def test_it_is_drawn_to_what_it_was(work: Workspace, sequential: Learner) -> None:
    tree = learned(TreeLora, work, 2, strength=5.0)

    def along(values: torch.nn.Module) -> float:
        blocks = [values.block(block) for block in work.layout.blocks]
        own = [torch.cat([m.a.flatten() for m in one.modules.values()]) for one in blocks]
        return sum(float((a * g).detach().sum()) for a, g in zip(own, tree.past[0], strict=True))

    assert along(tree.values) > 1.02 * along(sequential.values)


def test_what_a_task_leaves_is_the_mean_of_a_over_its_last_epoch(work: Workspace) -> None:
    steps: list[torch.Tensor] = []

    class Watched(TreeLora):
        def after_step(self) -> None:
            steps.append(torch.cat(self._directions()).detach().clone())
            super().after_step()

    tree = Watched(work, 3)
    tree.learn(work.stream.tasks[0], "test")
    assert len(steps) == tree.rounds == 4
    torch.testing.assert_close(torch.cat(tree.past[0]), torch.stack(steps).mean(dim=0))


def test_the_gradient_of_a_step_is_that_of_the_formula(work: Workspace) -> None:
    tree = learned(TreeLora, work, 2)
    tree.before_task(work.stream.tasks[2])
    tree.round = 1
    tree.zero_grad()
    inputs = images_of(work.stream.tasks[1])
    targets = torch.from_numpy(work.stream.tasks[1].train.labels[:6].copy())
    logits = tree(inputs, targets)
    loss = float(tree.objective.loss(logits, inputs, targets).detach())
    found = tree.penalty(inputs, targets, logits)
    own = tree._directions()
    found.backward()
    gradients = [
        torch.cat([one.a.grad.flatten() for one in tree.values.block(block).modules.values()])
        for block in work.layout.blocks
    ]
    goal = [tree.past[k][block] for block, k in enumerate(tree.chosen)]
    total = sum(float((a * g).detach().sum()) for a, g in zip(own, goal, strict=True))
    assert float(found.detach()) == pytest.approx(-0.5 * 2 / tree.rounds * loss, rel=1e-5)
    for gradient, one in zip(gradients, goal, strict=True):
        expected = -0.5 * 2 / tree.rounds * loss * one / total
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_tree_halves_tasks_by_how_alike_they_are() -> None:
    level = torch.tensor([[3.0, 0.0], [0.1, 1.0], [2.9, 0.1], [0.0, 1.1]])
    tree = Node.of([level, level], range(4))
    assert [half.tasks for half in tree.halves] == [(0, 2), (3, 1)] or [
        half.tasks for half in tree.halves
    ] == [(0, 2), (1, 3)]
    assert all(len(half.halves) == 2 for half in tree.halves)
    assert Node.of([level], range(4)).halves[0].halves == ()  # no block is left to tell them apart


def test_a_search_stays_in_the_half_that_it_chose() -> None:
    tree = Node((0, 1, 2, 3), (Node((0, 2), (Node((0,)), Node((2,)))), Node((1, 3))))
    bounds = torch.tensor([[1.0, 5.0, 5.0], [2.0, -9.0, 0.0], [3.0, 4.0, 1.0], [4.0, 0.0, 0.0]])
    assert tree.search(bounds) == [0, 2, 2]
    assert tree.search(-bounds) == [3, 3, 1]


def test_what_was_never_chosen_is_chosen_first_and_then_the_nearest(work: Workspace) -> None:
    tree = learned(TreeLora, work, 2)
    tree.before_task(work.stream.tasks[2])
    tree.rounds, tree.round = 10_000, 8_000
    assert bool(tree._bounds().isneginf().all())
    tree.counts.fill_(4_000)
    tree.distances = torch.tensor([[1.0], [2.0]]).expand_as(tree.counts) * tree.counts
    assert tree.tree.search(tree._bounds())[0] == 0
    tree.counts[0] = 4  # hardly known: its bound is wide
    tree.distances[0] = 4.0
    assert float(tree._bounds()[0, 0]) < float(tree._bounds()[1, 0])


def test_it_learns_texts_and_images_where_it_is_named(work: Workspace, tmp_path: Path) -> None:
    place = write_facts(tmp_path / "facts")
    texts = work_of(place, tmp_path / "texts", **{"train.epochs": 1})
    (row,) = in_turn(TreeLora, texts, texts.stream.tasks[:2])
    assert (row.id, len(row.loss or ())) == ("treelora", 3)
    for config in (small_config(tmp_path, baselines=("all",)), texts.config):
        named = config.model_copy(update={"baselines": ("treelora",)})
        every = config.model_copy(update={"baselines": ("all",)})
        assert chosen_baselines(open_method(named, seed=0)) == ("treelora",)
        assert "treelora" not in chosen_baselines(open_method(every, seed=0))
