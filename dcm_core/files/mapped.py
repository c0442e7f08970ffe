"""Tensors as views of their file: for whoever copies them, so that a model that is loaded is in memory once."""

import os

import torch
from torch import Tensor

from .storage import TensorFile


def views(file: TensorFile) -> dict[str, Tensor]:
    """All tensors as views of the mapped file: the system reads them when they are used, and drops them when it needs the room.

    Writing to one leaves the file as it is. While one lives the file has to stay: Windows lets nobody replace it, and elsewhere
    it must not be written to in place. What cannot be mapped is read.

    Raises:
        CheckpointError: a file that changed since it was opened.
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
    # torch has no views at odd addresses; few files hold such tensors
    if start % dtype.itemsize:
        return file.read(key)
    return whole[start : start + file.nbytes(key)].view(dtype).reshape(file.shapes[key])
