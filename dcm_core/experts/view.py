"""An expert in its file, read one layer at a time, so that experts of any size can be written in another format."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError, DCMError, ExpertError
from ..families import Family
from ..families.lora_names import Shapes, is_release_part
from ..files.checkpoint import Layout, recognise, release_metadata
from ..files.metadata import read_metadata
from ..files.tensor_file import TensorFile
from ..routing import Side
from .expert import Expert
from .match import AnyModel, Site, expert_part, tensor_name
from .reader import check_complete, check_metadata, check_reshapes, check_values, find_places, gathered
from .updates import DefaultScale, Update, site_updates


class ExpertView:
    """What the expert in a file does to each layer of its base. For a release, this is the detail expert.

    Attributes:
        metadata: what the file says of itself.
        modules: native names of the layers it changes.

    Args:
        shapes: native tensor name -> shape of the base; None for any model of the family.
        role: the side to use it for; None for its own.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or contains no expert.
        ExpertError: the expert is for another family or side, or a tensor does not fit any layer.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        family: Family | None = None,
        shapes: Shapes | None = None,
        role: Side | None = None,
    ):
        self.file = TensorFile(path)
        contents = recognise(self.file)
        found, self._keys = expert_part(self.file, contents)
        if not self._keys:
            raise CheckpointError(f"{path} is {contents.layout.value}; expected an expert file (a LoRA), or a release.")
        with self._named():
            released = contents.layout is Layout.RELEASE
            self.metadata = release_metadata(self.file, found) if released else read_metadata(self.file.metadata)
            family = family or found
            if family is None:
                raise ExpertError(
                    "Its layers are neither Wan's nor HunyuanVideo's. Choose an expert for one of these models."
                )
            self.family = family
            check_metadata(self.metadata, role or self.metadata.side, family)
            self._shapes = AnyModel(family) if shapes is None else shapes
            keys = {name: self.file.shapes[key] for name, key in self._keys.items()}
            sites, self._left_out = find_places(keys, family, self._shapes)
            if self.metadata.format is not None:
                check_complete(self._keys, self.metadata, self._shapes)
            self._scale = DefaultScale(
                family, self.file.metadata, self.file.path, released=is_release_part(self._keys, family)
            )
        self._sites: dict[str, list[Site]] = {}
        for site in sites:
            name = tensor_name(site.piece, next(iter(site.keys)), self._shapes)
            self._sites.setdefault(name.rpartition(".")[0], []).append(site)
        self.modules = tuple(self._sites)
        self.file.verify()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the file's name in front of errors."""
        try:
            yield
        except DCMError as error:
            raise ExpertError(f"{self.file.path}: {error}") from error

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on how it was read, complete once all layers were."""
        return self._scale.notes

    @property
    def left_out(self) -> list[str]:
        """Tensors of the file that are not for a transformer, or for a part that this one lacks."""
        return [key for keys in self._left_out.values() for key in keys]

    def updates(self, module: str) -> list[Update]:
        """What it does to one layer.

        Raises:
            CheckpointError: the file changed since it was opened.
            ExpertError: NaN or infinite values, or its trainer's settings cannot be read.
        """
        found: list[Update] = []
        for site in self._sites.get(module, ()):
            tensors = {kind: self.file.read(self._keys[key]) for kind, key in site.keys.items()}
            with self._named():
                held = {site.keys[kind]: tensor for kind, tensor in tensors.items()}
                check_values(held)
                if self._shapes.get(tensor_name(site.piece, "diff", self._shapes)):
                    check_reshapes([site], held, self._shapes)
                found += site_updates(site.piece, tensors, self.family, self._shapes, self._scale)
        return found

    def layer(self, module: str) -> Expert:
        """The same as an expert that changes this layer alone. It needs the base's shapes, and raises what `updates` raises."""
        changes = gathered(self.updates(module), self._shapes)
        return Expert(self.family.name, self.metadata.side or "semantic", *changes)
