"""Recognise a model file by its content, and read its parts in native names."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from ..errors import CheckpointError, counted, name_some
from ..families import FAMILIES, Family
from ..families.keymap import BLOCK_INDEX, Piece, fuse, fused_shape
from ..families.lora_names import split_key
from .fit import misfits
from .metadata import ExpertMetadata, read_metadata
from .tensor_file import Progress, TensorFile, each_read
from .values import is_finite

# ComfyUI saves HunyuanVideo with the prefix `model.model.`
PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "model.", "module.")
BASE_LAYER = ".base_layer."
# Larger than the tensor count of any model or LoRA.
MAX_TENSORS = 20_000
NATIVE_WEIGHT = re.compile(
    rf"(?P<stem>blocks|double_blocks|single_blocks)\.(?P<index>{BLOCK_INDEX})\.(?P<rest>.+\.weight)"
)


class Layout(Enum):
    """The kinds of file."""

    RELEASE = "DCM release (diffusers layout, both experts)"
    DIFFUSERS = "diffusers layout, no experts"
    NATIVE = "native layout"
    EXPERT = "expert or LoRA"
    OTHER = "something else"


@dataclass(frozen=True)
class Contents:
    """What a file contains.

    Attributes:
        family: None if no family's tensors were recognised.
        matched: native name -> the file's keys that make it up (diffusers layouts). `Piece.source` is the full key.
        detail: file key -> key without prefix, for the detail expert's tensors (releases).
    """

    layout: Layout
    family: Family | None = None
    matched: Mapping[str, Sequence[Piece]] | None = None
    detail: Mapping[str, str] | None = None

    def native_shapes(self, file: TensorFile) -> dict[str, tuple[int, ...]]:
        """Native tensor name -> shape of the semantic base (diffusers layouts)."""
        return {name: fused_shape([file.shapes[p.source] for p in pieces]) for name, pieces in self.matched.items()}


def recognise(file: TensorFile) -> Contents:
    """Recognise what a file is.

    Raises:
        CheckpointError: an incomplete or mixed-up file: some keys are known, but others are missing or unknown.
    """
    if len(file) > MAX_TENSORS:
        raise CheckpointError(
            f"{file.path} has {counted(len(file), 'tensor')}; expected at most {MAX_TENSORS} in a model or LoRA. Choose another file."
        )
    keys = {without_prefix(key): key for key in file.shapes}
    for family in FAMILIES.values():
        if family.is_native(keys):
            _check_blocks(file, family, keys)
            return Contents(Layout.NATIVE, family)
    lora = {key for key in keys if split_key(key)}
    if lora and not any(BASE_LAYER in key for key in keys.keys() - lora) and len(lora) > len(keys) // 2:
        return Contents(Layout.EXPERT)
    known = {name: _known(family, keys) for name, family in FAMILIES.items()}
    family = FAMILIES[max(known, key=known.__getitem__)]
    if known[family.name] <= len(keys) // 2:
        return Contents(Layout.OTHER)
    if len(keys) < len(file):
        raise CheckpointError(
            f"{file.path} has the same tensors with and without a prefix; expected one model. Load the unchanged file."
        )
    return _diffusers(file, family, keys)


def _check_blocks(file: TensorFile, family: Family, keys: Iterable[str]) -> None:
    """Check that all blocks of a kind have the same weights. The host checks the rest of a native file."""
    layers: dict[str, dict[int, set[str]]] = {}
    for key in keys:
        if match := NATIVE_WEIGHT.fullmatch(key):
            layers.setdefault(match["stem"], {}).setdefault(int(match["index"]), set()).add(match["rest"])
    missing = {
        f"{stem}.{index}.{rest}"
        for stem, blocks in layers.items()
        for index in range(max(blocks) + 1)
        for rest in set().union(*blocks.values()) - blocks.get(index, set())
    }
    if missing:
        raise CheckpointError(_half_message(file, family, Layout.NATIVE, missing, set()))


def without_prefix(key: str) -> str:
    """A key as the model names it."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def _known(family: Family, keys: Iterable[str]) -> int:
    """How many of the keys a diffusers-layout file of this family could have."""
    return sum(
        family.key_map.find(key.replace(BASE_LAYER, ".")) is not None
        or family.detail_source(key) is not None
        or ((name := split_key(key)) is not None and family.key_map.find_module(name.module) is not None)
        for key in keys
    )


def _diffusers(file: TensorFile, family: Family, keys: Mapping[str, str]) -> Contents:
    """The parts of a diffusers-layout file. Every key has to belong to one of them."""
    detail = {key for key in keys if family.detail_source(key) or split_key(key)}
    semantic = {key.replace(BASE_LAYER, "."): keys[key] for key in keys if key not in detail}
    if len(semantic) + len(detail) < len(keys):
        raise CheckpointError(
            f"{file.path} has weights both with and without .base_layer; expected one kind. Load the unchanged file."
        )
    report = family.key_map.match(semantic)
    wrapped = {key for key in keys if BASE_LAYER in key}
    layout = Layout.RELEASE if detail or wrapped else Layout.DIFFUSERS
    missing, odd = set(report.missing), set(report.unmatched)
    if layout is Layout.RELEASE:
        missing_detail, odd_detail = _check_detail(file, family, detail, set(semantic), missing)
        missing, odd = missing | missing_detail, odd | odd_detail
    if missing or odd:
        raise CheckpointError(_half_message(file, family, layout, missing, odd))
    _check_fit(file, family, report.matched, semantic, {key: keys[key] for key in sorted(detail)})
    matched = {
        target: [replace(piece, source=semantic[piece.source]) for piece in pieces]
        for target, pieces in report.matched.items()
    }
    return Contents(layout, family, matched, {keys[key]: key for key in sorted(detail)})


def _check_detail(
    file: TensorFile, family: Family, detail: set[str], semantic: set[str], semantic_missing: set[str]
) -> tuple[set[str], set[str]]:
    """(missing, odd) keys of a release's detail expert. `semantic` are the base's keys, `semantic_missing` its missing keys."""
    targets = {module for key in semantic if family.lora_target_pattern.fullmatch(module := key.rpartition(".")[0])}
    pairs = {key: name for key in detail if not family.detail_source(key) and (name := split_key(key))}
    odd = {key for key, name in pairs.items() if name.module not in targets or name.kind not in ("down", "up")}
    adapters = sorted({name.adapter for name in pairs.values() if name.adapter}) or ["lora1"]
    if len(adapters) > 1:
        raise CheckpointError(
            f"{file.path} has the adapters {', '.join(adapters)}; expected one, as in a release. Load the unchanged file."
        )
    missing = {f"{module}.lora_{part}.{adapters[0]}.weight" for module in targets for part in "AB"} - detail
    copies = {source for key in detail if (source := family.detail_source(key))}
    for module in family.detail_modules:
        own = {key for key in semantic if key.startswith(f"{module}.")}
        missing |= {key.replace(module, f"{module}_lora", 1) for key in own - copies}
    odd |= {
        key for key in detail if (source := family.detail_source(key)) and source not in semantic | semantic_missing
    }
    return missing, odd


def _check_fit(
    file: TensorFile,
    family: Family,
    matched: Mapping[str, Sequence[Piece]],
    semantic: Mapping[str, str],
    detail: Mapping[str, str],
) -> None:
    """Check that the shapes and dtypes of all tensors fit each other.

    Args:
        semantic, detail: name in the model -> the file's key.
    """
    names = {**semantic, **detail}
    shapes, dtypes = ({name: values[key] for name, key in names.items()} for values in (file.shapes, file.dtypes))
    if wrong := misfits(shapes, dtypes, family, matched, detail):
        first = min(wrong)
        raise CheckpointError(
            f"The tensors of {file.path} do not fit each other: {name_some(wrong)}. {first} {wrong[first]}. Download it again."
        )


def _half_message(file: TensorFile, family: Family, layout: Layout, missing: set[str], odd: set[str]) -> str:
    parts = [f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({name_some(missing)})"] if missing else []
    parts += [f"{counted(len(odd), 'is', 'are')} unknown ({name_some(odd)})"] if odd else []
    shard = (
        " It looks like one shard of several: merge all shards into one file first." if "-of-" in file.path.name else ""
    )
    return (
        f"{file.path} looks like {family.title}, {layout.value}, but {' and '.join(parts)}. Expected every tensor of the "
        f"model and nothing else; download it again or load the unchanged release file.{shard}"
    )


def semantic_state_dict(
    file: TensorFile,
    contents: Contents,
    progress: Progress | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The base (semantic) weights of a diffusers-layout file in native names.

    Args:
        tensors: the file's tensors, used without a check; call `check_base` for that. None reads and checks each once.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    if tensors is None:
        return dict(each_native(file, contents, progress))
    reader = each_read(file, _sources(contents), progress, tensors.__getitem__)
    return {target: fuse(pieces, dict(next(reader) for _ in pieces)) for target, pieces in contents.matched.items()}


def each_native(file: TensorFile, contents: Contents, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors in native names, one at a time.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    reader = each_read(file, _sources(contents), progress)
    for target, pieces in contents.matched.items():
        tensors = dict(next(reader) for _ in pieces)
        check_finite(file, tensors)
        yield target, fuse(pieces, tensors)


def check_base(file: TensorFile, contents: Contents, tensors: Mapping[str, Tensor]) -> None:
    """Refuse broken base weights.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    check_finite(file, {source: tensors[source] for source in _sources(contents)})


def _sources(contents: Contents) -> list[str]:
    """The file's keys of the base, in the order in which its native tensors are built."""
    return [piece.source for pieces in contents.matched.values() for piece in pieces]


def release_metadata(file: TensorFile, family: Family) -> ExpertMetadata:
    """The metadata of a release's detail expert: from the file if we wrote it, else the official code's values.

    Raises:
        ExpertError: the metadata cannot be read.
    """
    said, preset = read_metadata(file.metadata), family.preset
    boundary, timesteps = (
        (preset.boundary, preset.timesteps) if said.boundary is None else (said.boundary, said.timesteps)
    )
    return ExpertMetadata(family.name, "detail", boundary=boundary, timesteps=timesteps)


def check_finite(file: TensorFile, tensors: Mapping[str, Tensor]) -> None:
    """Refuse broken weights.

    Raises:
        CheckpointError: NaN or infinite values. The message names their keys.
    """
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{file.path} has NaN or infinite values in {name_some(broken)}. Download the file again."
        )
