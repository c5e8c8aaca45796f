"""The trained head: growth keeps old rows, masked logits, and its solved counterpart."""

import pytest
import torch

from memtool.errors import ConfigError, MismatchError
from memtool.heads import LinearClassifier, LinearHead, mask_logits


def trained_head() -> LinearHead:
    head = LinearHead(4, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    return head


def test_growth_keeps_the_old_rows_bit_for_bit_and_starts_the_new_ones_at_zero() -> None:
    head = trained_head()
    old, features = head.classifier(), torch.randn(5, 4)
    logits = head(features)
    head.grow(2)
    assert torch.equal(head.weight[:3], old.weight)
    assert torch.equal(head.bias[:3], old.bias)
    assert not head.weight[3:].any()
    assert not head.bias[3:].any()
    torch.testing.assert_close(head(features)[:, :3], logits)
    assert (head.dim, head.classes) == (4, 5)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert {name for name, _ in head.named_parameters()} == {"weight", "bias"}


def test_a_new_head_finds_every_class_equally_likely() -> None:
    probabilities = LinearHead(4, 5)(torch.randn(2, 4)).softmax(-1)
    torch.testing.assert_close(probabilities, torch.full((2, 5), 0.2))


def test_masked_classes_get_no_probability_and_no_gradient() -> None:
    head = trained_head()
    logits = head(torch.randn(6, 4), allowed=[0, 2])
    assert torch.equal(logits[:, 1], torch.full((6,), -torch.inf))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2] * 3)).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad[1].any()
    assert head.weight.grad[[0, 2]].any()


def test_mask_names_classes_that_are_there() -> None:
    for allowed in ([], [3], [-1]):
        with pytest.raises(MismatchError, match="masked to classes"):
            mask_logits(torch.zeros(2, 3), allowed)
    assert torch.equal(mask_logits(torch.zeros(2, 3), [0, 1, 2]), torch.zeros(2, 3))


def test_a_head_starts_from_a_solved_classifier() -> None:
    head = trained_head()
    kept = head.weight[2].detach().clone()
    solved = LinearClassifier(torch.ones(3, 4), torch.tensor([1.0, 2.0, -torch.inf]))
    head.start_from(solved)
    assert torch.equal(head.weight[:2], solved.weight[:2])
    assert torch.equal(head.weight[2], kept)
    assert head.bias.isfinite().all()
    with pytest.raises(MismatchError, match=r"\(2, 4\)"):
        head.start_from(LinearClassifier(torch.ones(2, 4), torch.ones(2)))


def test_a_solved_classifier_stays_in_float32_under_autocast() -> None:
    classifier = LinearClassifier(1000 * torch.randn(3, 4), torch.randn(3))
    features = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifier(features))
    assert torch.equal(classifier.to("cpu")(features, [1])[:, 1], logits[:, 1])
    assert classifier.classes == 3
    with pytest.raises(MismatchError, match="width 4"):
        classifier(torch.randn(5, 3))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        LinearHead(4, 0)
    with pytest.raises(ConfigError, match="growth by -1"):
        trained_head().grow(-1)
