"""Read a model file in any layout by native names, one tensor at a time."""

import os

import torch
from torch import Tensor

from ..errors import CheckpointError, name_some
from ..families import Family
from ..families.keymap import Piece, fuse, fused_shape
from .checkpoint import Contents, check_finite, recognise, without_prefix
from .tensor_file import TensorFile

# Names of the extra tensors that quantised files store for a weight.
QUANTISED = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")


class NativeView:
    """A model file in any layout, read by native names."""

    def __init__(self, path: str | os.PathLike):
        self.file = TensorFile(path)
        self.contents: Contents = recognise(self.file)
        if self.contents.family is None:
            raise CheckpointError(f"{path} is {self.contents.layout.value}; expected a Wan or HunyuanVideo model file.")
        self.pieces = self.contents.matched or self._native_pieces()

    @property
    def family(self) -> Family:
        return self.contents.family

    def _native_pieces(self) -> dict[str, list[Piece]]:
        mark = self.family.native_marks[0]
        prefix = next(key for key in self.file.shapes if without_prefix(key) == mark).removesuffix(mark)
        # a full checkpoint also has a VAE and text encoders
        keys = [key for key in self.file.shapes if key.startswith(prefix)]
        quantised = [key for key in keys if key.endswith(QUANTISED)]
        if quantised:
            raise CheckpointError(
                f"{self.file.path} is quantised: its weights need the scales beside them ({name_some(quantised)}). "
                "Use the bf16, fp16 or fp32 version of the model."
            )
        pieces: dict[str, list[Piece]] = {}
        for key in keys:
            bare = key.removeprefix(prefix)
            name = alias.target if (alias := self.family.alias_map.find(bare)) else bare
            pieces.setdefault(name, []).append(Piece(key, name))
        double = [piece.source for found in pieces.values() if len(found) > 1 for piece in found]
        if double:
            raise CheckpointError(
                f"{self.file.path} has the same tensors under two names ({name_some(double)}). Load the unchanged file."
            )
        return pieces

    def shape(self, name: str) -> tuple[int, ...]:
        return fused_shape([self.file.shapes[piece.source] for piece in self.pieces[name]])

    def dtype(self, name: str) -> torch.dtype:
        return self.file.dtypes[self.pieces[name][0].source]

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: NaN or infinite weights.
        """
        pieces = self.pieces[name]
        tensor = fuse(pieces, {piece.source: self.file.read(piece.source) for piece in pieces})
        check_finite(self.file, {name: tensor})
        return tensor
