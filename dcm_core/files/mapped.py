"""Tensors as views of their mapped file, for callers that copy them, so that a model is in memory only once."""

import os

import torch
from torch import Tensor

from .tensor_file import TensorFile


def views(file: TensorFile) -> dict[str, Tensor]:
    """All tensors as views of the mapped file. The system reads them on use, and drops them when it needs memory.

    Writing to a tensor does not change the file. The file must stay while a view exists. Windows does not let anyone replace
    it; on other systems it must not be written to in place. A tensor that cannot be mapped is read.

    Raises:
        CheckpointError: the file changed since it was opened.
    """
    end = max((file.offsets[key] + file.nbytes(key) for key in file.shapes), default=0)
    try:
        storage = torch.UntypedStorage.from_file(os.fspath(file.path), shared=False, nbytes=end)
    except (RuntimeError, UnicodeError):
        return file.read_all()
    file.refuse_changed()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    return {key: _view(file, key, whole) for key in file.shapes}


def _view(file: TensorFile, key: str, whole: Tensor) -> Tensor:
    start, dtype = file.offsets[key], file.dtypes[key]
    # torch has no views at unaligned addresses, but few files need them
    if start % dtype.itemsize:
        return file.read(key)
    return whole[start : start + file.nbytes(key)].view(dtype).reshape(file.shapes[key])
