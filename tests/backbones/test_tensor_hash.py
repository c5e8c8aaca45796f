"""The hash of a model's tensors: what changes it and what must not."""

import hashlib

import torch

from memtool.backbones.tensor_hash import tensor_sha256


def test_is_the_sha256_of_name_dtype_shape_and_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"w\0torch.float32\0(1, 2)\0" + tensor.numpy().tobytes())
    assert tensor_sha256({"w": tensor}) == expected.hexdigest()


def test_order_layout_and_gradients_do_not_matter() -> None:
    a, b = torch.randn(3, 4), torch.randn(5).to(torch.bfloat16)
    plain = tensor_sha256({"a": a, "b": b})
    assert tensor_sha256({"b": b, "a": a}) == plain
    assert tensor_sha256({"a": a.t().contiguous().t().requires_grad_(), "b": b}) == plain


def test_name_dtype_shape_and_every_bit_matter() -> None:
    a = torch.zeros(4)
    variants = [
        {"a": a},
        {"b": a},
        {"a": a.double()},
        {"a": torch.zeros(8, dtype=torch.float16)},
        {"a": a.reshape(2, 2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": a, "b": torch.zeros(0)},
    ]
    assert len({tensor_sha256(variant) for variant in variants}) == len(variants)


def test_scalars_and_empty_tensors_have_a_hash() -> None:
    assert tensor_sha256({"a": torch.tensor(1.0)}) != tensor_sha256({"a": torch.tensor([1.0])})
    assert tensor_sha256({}) == hashlib.sha256().hexdigest()


def test_long_tensors_are_hashed_whole() -> None:
    long = torch.zeros((1 << 24) + 3, dtype=torch.uint8)
    changed = long.clone()
    changed[-1] = 1
    assert tensor_sha256({"a": long}) != tensor_sha256({"a": changed})
