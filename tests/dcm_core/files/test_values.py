"""What numbers tensors hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import CheckpointError
from dcm_core.files.values import CHUNK, cast, is_finite

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu], ids=str)
def test_every_number_of_one_byte(dtype):
    for byte in range(256):
        number = torch.tensor([byte], dtype=torch.uint8).view(dtype)
        assert is_finite(number) == bool(torch.isfinite(number.float())), f"{byte:02x} is {number.float().item()}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, CHUNK - 1, CHUNK + 1, 3 * CHUNK])
def test_numbers_whose_sum_is_none(dtype, count):
    """The largest of a dtype add up to infinity, and with the smallest to no number: all are finite."""
    limits = torch.finfo(dtype)
    for first, second in (
        (limits.max, limits.max),
        (limits.min, limits.min),
        (limits.max, limits.min),
        (limits.tiny, 0.0),
    ):
        values = torch.full((count,), first, dtype=dtype)
        values[1::2] = second
        assert is_finite(values), (first, second)
        for bad in (float("nan"), float("inf"), -float("inf")) if count else ():
            for place in {0, count // 2, count - 1}:
                values[place] = bad
                assert not is_finite(values), (first, second, bad, place)
                values[place] = first


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@given(data=st.data())
def test_the_verdict_is_that_of_isfinite(dtype, data):
    raw = data.draw(st.binary(min_size=dtype.itemsize, max_size=40 * dtype.itemsize))
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    wider = values if dtype.itemsize > 1 else values.float()
    assert is_finite(values) == bool(torch.isfinite(wider).all())
    assert is_finite(values.expand(2, len(values)).T) == bool(torch.isfinite(wider).all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_finite(dtype):
    assert is_finite(torch.ones(3, 2).to(dtype))


def test_a_cast_that_loses_values_is_refused():
    large = torch.tensor([1e5])
    assert cast("a", large, torch.bfloat16).dtype is torch.bfloat16
    assert torch.equal(cast("n", torch.tensor([7]), torch.int32), torch.tensor([7], dtype=torch.int32))
    with pytest.raises(
        CheckpointError, match=r"a has values too large for torch\.float16\. Choose bfloat16 or float32"
    ):
        cast("a", large, torch.float16)
