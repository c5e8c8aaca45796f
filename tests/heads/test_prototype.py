"""The head of fixed prototypes against loops, and the loss from images to texts and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.errors import DataError, MismatchError
from memtool.heads import CosineHead, both_ways, prototype_head


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 6, generator=generator) + 2
    return features, torch.randint(0, 4, (30,), generator=generator)


def test_prototypes_are_normalised_means_of_normalised_features() -> None:
    features, labels = data()
    head = prototype_head(features, labels, 5, scale=20.0)
    for label in range(4):
        units = [f.double() / f.double().norm() for f, y in zip(features, labels, strict=True)
                 if y == label]  # fmt: skip
        mean = sum(units) / len(units)
        torch.testing.assert_close(
            head.prototypes[label].double(), mean / mean.norm(), atol=1e-6, rtol=0
        )
    assert not head.prototypes[4].any()
    logits = head(features)
    assert logits.dtype == torch.float32
    for row, feature in zip(logits, features, strict=True):
        for label in range(4):
            cosine = F.cosine_similarity(feature, head.prototypes[label], dim=0)
            assert float(row[label]) == pytest.approx(20 * float(cosine), abs=1e-4)
    # A class without images is never the answer.
    assert (logits[:, 4] == -torch.inf).all()


def test_the_length_of_a_feature_does_not_matter() -> None:
    features, labels = data()
    head = prototype_head(features, labels, 4, scale=20.0)
    scaled = features * torch.rand(30, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    torch.testing.assert_close(head(scaled), head(features))
    other = prototype_head(scaled, labels, 4, scale=20.0)
    torch.testing.assert_close(other.prototypes, head.prototypes)


def test_linear_scores_rank_as_the_head_does() -> None:
    features, labels = data()
    head = prototype_head(features, labels, 5, scale=20.0)
    linear = head.linear()
    assert linear.bias.tolist() == [0, 0, 0, 0, -torch.inf]
    torch.testing.assert_close(
        linear(features)[:, :4], (head(features) * features.norm(dim=1, keepdim=True))[:, :4]
    )
    assert torch.equal(linear(features).argmax(1), head(features).argmax(1))


def test_allowed_classes_and_unknown_ones() -> None:
    features, _ = data()
    head = CosineHead.of_classes(torch.tensor([[3.0, 4.0]]), [1], 3, 1.0)
    assert head.classes == 3
    torch.testing.assert_close(head.prototypes[1], torch.tensor([0.6, 0.8]))
    logits = head(torch.tensor([[0.6, 0.8]]), [1, 2])
    assert logits.tolist() == [[-torch.inf, pytest.approx(1.0), -torch.inf]]
    with pytest.raises(MismatchError, match="features of width 6"):
        head(features)


def test_gradients_reach_features_and_directions() -> None:
    directions = torch.randn(2, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(4)).requires_grad_()
    head = CosineHead.of_classes(directions, [0, 2], 4, scale)
    both_ways(head(features), torch.tensor([0, 2, 2, 0])).backward()
    for tensor in (directions, features, scale):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_a_feature_without_direction_is_an_error() -> None:
    features, labels = data()
    for wrong in (0.0, float("nan")):
        broken = features.clone()
        broken[3] = wrong
        with pytest.raises(DataError, match="zero or not finite"):
            prototype_head(broken, labels, 4, 1.0)


def test_with_one_image_a_class_it_is_the_loss_of_clip() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()
    order = torch.tensor([3, 1, 4, 0, 2])
    square = logits[:, order]  # image i and text order[i] belong together
    target = torch.arange(5)
    wanted = (F.cross_entropy(square, target) + F.cross_entropy(square.T, target)) / 2
    assert float(both_ways(logits, order)) == pytest.approx(float(wanted), abs=1e-6)


def test_texts_of_several_images_share_their_target() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    logits[:, 1] = -torch.inf  # a class that is not in the batch
    labels = torch.tensor([0, 2, 0, 0])
    rows = logits.double().log_softmax(dim=1)
    columns = logits.double().log_softmax(dim=0)
    to_text = -sum(rows[i, label] for i, label in enumerate(labels.tolist())) / 4
    to_image = -((columns[0, 0] + columns[2, 0] + columns[3, 0]) / 3 + columns[1, 2]) / 2
    wanted = float(to_text + to_image) / 2
    assert float(both_ways(logits, labels)) == pytest.approx(wanted, abs=1e-6)
