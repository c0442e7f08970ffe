"""The numbers that tensors hold."""

import torch
from torch import Tensor

from ..errors import CheckpointError

# What is looked at at once: stays in the processor's cache, and its sum within the range of float16.
CHUNK = 2**18
# Largest byte of a finite number, without its sign.
FINITE_BYTES = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as they are in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """True if every value is a finite number; fp8 included. Takes no memory and one pass."""
    flat = tensor.detach().reshape(-1)
    if tensor.dtype in FINITE_BYTES:
        largest = FINITE_BYTES[tensor.dtype]
        return all(int((part & 0x7F).max()) <= largest for part in flat.view(torch.uint8).split(CHUNK) if len(part))
    if tensor.dtype.itemsize == 1:  # an exponent alone, or whole numbers
        flat = flat.float()
    # what is added to NaN or infinity is never finite again; large numbers alone may add up to infinity, too
    return all(bool(torch.isfinite(part.sum())) or bool(torch.isfinite(part).all()) for part in flat.split(CHUNK))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        CheckpointError: values that are no numbers there.
    """
    value = tensor.to(dtype)
    if value.is_floating_point() and not is_finite(value):
        raise CheckpointError(f"{name} has values too large for {dtype}. Choose bfloat16 or float32.")
    return value
