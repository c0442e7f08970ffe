"""Check and convert the values of tensors."""

import torch
from torch import Tensor

from ..errors import CheckpointError

# Bytes that are checked at once; they fit the processor's cache.
CHUNK = 2**18
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The bits of infinity or the smallest NaN. All larger bit patterns are NaN.
FIRST_BROKEN = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0xFF << 23,
    torch.bfloat16: 0xFF << 7,
    torch.float16: 0x1F << 10,
    torch.float8_e5m2: 0x1F << 2,
    torch.float8_e4m3fn: 0x7F,
}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """True if every value is finite. fp8 is supported.

    It makes one pass on one thread and needs no extra memory, because it runs beside other threads.
    """
    flat = tensor.detach().reshape(-1)
    if tensor.dtype not in FIRST_BROKEN:  # integers, or types without a mantissa
        return bool(torch.isfinite(flat if tensor.dtype.itemsize > 1 else flat.float()).all())
    size, broken = tensor.dtype.itemsize, FIRST_BROKEN[tensor.dtype]
    signed = flat.view(INTEGERS[size]).cpu().numpy()
    # with the sign bit set, a value is negative as a signed number and above all others as an unsigned one
    unsigned, negative = signed.view(f"u{size}"), 1 << (8 * size - 1)
    parts = (slice(start, start + CHUNK // size) for start in range(0, len(signed), CHUNK // size))
    return all(signed[part].max() < broken and unsigned[part].max() < broken + negative for part in parts)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    value = tensor.to(dtype)
    if value.is_floating_point() and not is_finite(value):
        raise CheckpointError(f"{name} has values too large for {dtype}. Choose bfloat16 or float32.")
    return value
