"""Heads recalled with their tasks, against a loop over samples and tasks."""

import pytest
import torch

from memtool.errors import CorruptError, MismatchError
from memtool.heads import LinearClassifier, RecalledHead


def heads(tasks=3, classes=4, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(tasks):
        weight = torch.randn(classes, dim, generator=generator)
        made.append(LinearClassifier(weight, torch.randn(classes, generator=generator)))
    return made


def test_mixed_probabilities_equal_the_loop():
    made = heads()
    made[1].bias[2] = -torch.inf
    owners = [0, 0, 1, 2]
    head = RecalledHead.of_tasks(made, owners)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 5, generator=generator)
    coefficients = torch.randn(6, 4, generator=generator)
    expected = torch.zeros(6, 4)
    for i in range(6):
        for adapter, task in enumerate(owners):
            p = (made[task].weight @ features[i] + made[task].bias).softmax(0)
            expected[i] += coefficients[i, adapter] * p
    assert torch.allclose(head(features, coefficients), expected, atol=1e-6)


def test_one_hot_coefficients_give_the_task_s_own_answer():
    made = heads()
    head = RecalledHead.of_tasks(made, [0, 1, 2])
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    for task in range(3):
        one_hot = torch.eye(3)[task].expand(7, -1)
        assert torch.equal(head(features, one_hot).argmax(1), made[task](features).argmax(1))


def test_a_shared_head_does_not_look_at_coefficients():
    made = heads(1)[0]
    head = RecalledHead.shared(made)
    features = torch.randn(3, 5)
    assert torch.allclose(head(features, torch.zeros(3, 9)), made(features))


def test_a_head_that_knows_none_of_the_allowed_classes_says_nothing():
    made = heads(2)
    made[0].bias[:2] = -torch.inf
    head = RecalledHead.of_tasks(made, [0, 1])
    scores = head(torch.randn(4, 5), torch.full((4, 2), 0.5), allowed=(0, 1))
    assert torch.isfinite(scores).all()
    assert torch.allclose(scores.sum(1), torch.full((4,), 0.5))


def test_probabilities_sum_to_one_even_with_negative_coefficients():
    head = RecalledHead.of_tasks(heads(), [0, 1, 2])
    coefficients = torch.tensor([[1.4, -0.2, -0.2], [0.4, 0.3, 0.3]])
    scores = head(torch.randn(2, 5), coefficients)
    assert torch.allclose(head.probabilities(scores).sum(1), torch.ones(2))


@pytest.mark.parametrize("allowed", [None, (0, 2)])
def test_the_loss_is_bounded_below_and_agrees_for_one_hot_coefficients(allowed):
    made = heads()
    made[1].bias[2] = -torch.inf
    head = RecalledHead.of_tasks(made, [0, 1, 2])
    features = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    wild = torch.tensor([[9.0, -4.0, -7.0]]).expand(5, -1).clone().requires_grad_()
    logs = head.log_probabilities(features, wild, allowed)
    assert (logs <= 0).all()
    assert torch.allclose(logs.exp().sum(1), torch.ones(5), atol=1e-5)
    logs[:, 0].sum().backward()
    assert torch.isfinite(wild.grad).all()
    assert wild.grad.abs().sum() > 0
    one_hot = torch.eye(3)[0].expand(5, -1)
    expected = head(features, one_hot, allowed)
    assert torch.allclose(
        head.log_probabilities(features, one_hot, allowed).exp(), expected, atol=1e-4
    )


@pytest.mark.parametrize("shared", [True, False])
def test_bytes_round_trip(shared):
    made = heads()
    head = RecalledHead.shared(made[0]) if shared else RecalledHead.of_tasks(made, [0, 1, 1, 2])
    again = RecalledHead.from_bytes(head.to_bytes(), "here")
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)
    assert (again.owners is None) == shared


def test_bad_input():
    with pytest.raises(MismatchError, match="2 heads"):
        RecalledHead.of_tasks(heads(2), [0, 2])
    with pytest.raises(CorruptError, match="here is no safetensors file"):
        RecalledHead.from_bytes(b"nothing", "here")


@pytest.mark.parametrize("allowed", [None, (0, 2)])
def test_heads_without_a_weight_are_not_computed(allowed):
    made = heads(5)
    owners = [0, 1, 1, 2, 3, 4]
    coefficients = torch.zeros(4, 6)
    coefficients[[0, 1, 3], [2, 4, 1]] = torch.tensor([1.0, 0.7, -0.3])
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    whole = RecalledHead.of_tasks(made, owners)
    learned = coefficients.clone().requires_grad_()  # a weight of zero has a slope
    wanted = whole(features, learned, allowed), whole.log_probabilities(features, learned, allowed)
    broken = RecalledHead.of_tasks(made, owners)
    broken.weight[[0, 2, 4]] = torch.nan
    found = (
        broken(features, coefficients, allowed),
        broken.log_probabilities(features, coefficients, allowed),
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.detach())
    wanted[0].square().sum().backward()
    assert (learned.grad != 0).all(dim=1).any()
