"""Tensors in bytes, for numpy as for torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from memtool.errors import CorruptError
from memtool.tensor_bytes import load_arrays, narrowed, read_arrays, read_tensors, widened

TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


def test_every_bfloat16_is_widened_and_narrowed_as_torch_does() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widened(bits).view(np.uint32), theirs.view(np.uint32))
    finite = np.isfinite(theirs)
    assert np.array_equal(narrowed(theirs[finite]), bits[finite])


def test_float32_is_rounded_to_bfloat16_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    largest = np.array([3.4e38, -3.4e38, 1e-45, 0.0, -0.0], np.float32).view(np.uint32)
    numbers = np.concatenate([bits, ties, ties - 1, ties + 1, largest]).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    theirs = torch.from_numpy(numbers).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(narrowed(numbers), theirs.view(np.uint16))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)], ids=str)
def test_arrays_have_the_bytes_of_the_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    data = save({"x": torch.ones(shape).to(dtype)})
    tensor, array = load(data)["x"], load_arrays(data, "it")["x"]
    assert (array.dtype, array.shape, array.ndim) == (str(tensor.dtype), shape, len(shape))
    assert array.bits.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    if dtype == torch.bfloat16:
        assert np.array_equal(array.numbers, tensor.float().numpy())


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(2)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(3), "c": torch.zeros(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int64), "b": torch.zeros(3)},
        {"a": torch.zeros(2), "b": torch.zeros(3)},
        {"a": torch.full((2, 3), torch.nan, dtype=torch.bfloat16), "b": torch.zeros(3)},
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(tensors: dict[str, torch.Tensor]) -> None:
    said = []
    for read in (read_tensors, read_arrays):
        with pytest.raises(CorruptError) as caught:
            read(save(tensors), "it", a="n d", b="d")
        said.append((caught.value.message, caught.value.expected))
    assert said[0] == said[1]


def test_no_safetensors_is_refused_in_the_same_words() -> None:
    whole = save({"a": torch.zeros(2, 3)})
    for data in (b"", b"no", whole[:-1], whole.replace(b'"F32"', b'"F99"')):
        said = []
        for read in (read_tensors, read_arrays):
            with pytest.raises(CorruptError, match="no safetensors file") as caught:
                read(data, "it", a="n d")
            said.append(caught.value.message)
        assert said[0] == said[1]
