"""What a model file is, by its content, and its parts in native names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from .errors import CheckpointError, counted, name_some
from .experts import Expert, expert_from_release
from .families import FAMILIES, Family
from .keymap import BLOCK_INDEX, Piece, fuse, fused_shape
from .lora_names import split_key
from .mapped import views
from .storage import Progress, TensorFile, each_read, is_finite

# `model.model.` is what ComfyUI saves HunyuanVideo with
PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "model.", "module.")
BASE_LAYER = ".base_layer."
NATIVE_WEIGHT = re.compile(rf"(?P<stem>blocks|double_blocks|single_blocks)\.(?P<index>{BLOCK_INDEX})\.(?P<rest>.+\.weight)")


class Layout(Enum):
    """The kinds of file there are."""

    RELEASE = "DCM release (diffusers layout, both experts)"
    DIFFUSERS = "diffusers layout, no experts"
    NATIVE = "native layout"
    EXPERT = "expert or LoRA"
    OTHER = "something else"


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        family: None where no family's tensors were recognised.
        matched: native name -> the file's keys that make it (diffusers layouts; `Piece.source` is the full key).
        detail: file key -> key without prefix, of the detail expert's tensors (releases).
    """

    layout: Layout
    family: Family | None = None
    matched: Mapping[str, Sequence[Piece]] | None = None
    detail: Mapping[str, str] | None = None

    def native_shapes(self, file: TensorFile) -> dict[str, tuple[int, ...]]:
        """Native tensor name -> shape of the semantic base (diffusers layouts)."""
        return {name: fused_shape([file.shapes[p.source] for p in pieces]) for name, pieces in self.matched.items()}


def recognise(file: TensorFile) -> Contents:
    """Say what a file is.

    Raises:
        CheckpointError: a file that is half one thing: known keys with others missing or unknown.
    """
    keys = {without_prefix(key): key for key in file.shapes}
    for family in FAMILIES.values():
        if family.is_native(keys):
            _check_blocks(file, family, keys)
            return Contents(Layout.NATIVE, family)
    lora = {key for key in keys if split_key(key)}
    if lora and not any(BASE_LAYER in key for key in keys) and len(lora) > len(keys) // 2:
        return Contents(Layout.EXPERT)
    known = {name: _known(family, keys) for name, family in FAMILIES.items()}
    family = FAMILIES[max(known, key=known.__getitem__)]
    if known[family.name] <= len(keys) // 2:
        return Contents(Layout.OTHER)
    if len(keys) < len(file):
        raise CheckpointError(f"{file.path} holds the same tensors with and without a prefix; expected one model. Load a clean file.")
    return _diffusers(file, family, keys)


def _check_blocks(file: TensorFile, family: Family, keys: Iterable[str]) -> None:
    """A native file is the host's to load, but every block has to have the weights that any block of its kind has."""
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
    """A key as the model itself names it."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def _known(family: Family, keys: Iterable[str]) -> int:
    """How many of the keys a diffusers-layout file of the family could have."""
    return sum(
        family.key_map.find(key.replace(BASE_LAYER, ".")) is not None
        or family.detail_source(key) is not None
        or ((name := split_key(key)) is not None and family.key_map.find_module(name.module) is not None)
        for key in keys
    )


def _diffusers(file: TensorFile, family: Family, keys: Mapping[str, str]) -> Contents:
    """The parts of a diffusers-layout file, every key accounted for."""
    detail = {key for key in keys if family.detail_source(key) or split_key(key)}
    semantic = {key.replace(BASE_LAYER, "."): keys[key] for key in keys if key not in detail}
    if len(semantic) + len(detail) < len(keys):
        raise CheckpointError(f"{file.path} holds weights both with and without .base_layer; expected one. Load the unchanged file.")
    report = family.key_map.match(semantic)
    wrapped = {key for key in keys if BASE_LAYER in key}
    layout = Layout.RELEASE if detail or wrapped else Layout.DIFFUSERS
    missing, odd = set(report.missing), set(report.unmatched)
    if layout is Layout.RELEASE:
        missing_detail, odd_detail = _check_detail(file, family, detail, set(semantic), missing)
        missing, odd = missing | missing_detail, odd | odd_detail
    if missing or odd:
        raise CheckpointError(_half_message(file, family, layout, missing, odd))
    _check_shapes(file, family, report.matched, keys, semantic, detail)
    matched = {
        target: [Piece(semantic[p.source], p.target, p.part, p.swap_halves) for p in pieces]
        for target, pieces in report.matched.items()
    }
    return Contents(layout, family, matched, {keys[key]: key for key in sorted(detail)})


def _check_detail(
    file: TensorFile, family: Family, detail: set[str], semantic: set[str], semantic_missing: set[str]
) -> tuple[set[str], set[str]]:
    """(missing, odd) keys of a release's detail expert, given the base's keys and which of them are missing."""
    targets = {module for key in semantic if family.lora_target_pattern.fullmatch(module := key.rpartition(".")[0])}
    pairs = {key: name for key in detail if not family.detail_source(key) and (name := split_key(key))}
    odd = {key for key, name in pairs.items() if name.module not in targets or name.kind not in ("down", "up")}
    adapters = sorted({name.adapter for name in pairs.values() if name.adapter}) or ["lora1"]
    if len(adapters) > 1:
        raise CheckpointError(f"{file.path} holds the adapters {', '.join(adapters)}; a release has one. Load the unchanged file.")
    missing = {f"{module}.lora_{part}.{adapters[0]}.weight" for module in targets for part in "AB"} - detail
    copies = {source for key in detail if (source := family.detail_source(key))}
    for module in family.detail_modules:
        own = {key for key in semantic if key.startswith(f"{module}.")}
        missing |= {key.replace(module, f"{module}_lora", 1) for key in own - copies}
    odd |= {key for key in detail if (source := family.detail_source(key)) and source not in semantic | semantic_missing}
    return missing, odd


def _check_shapes(
    file: TensorFile,
    family: Family,
    matched: Mapping[str, Sequence[Piece]],
    keys: Mapping[str, str],
    semantic: Mapping[str, str],
    detail: set[str],
) -> None:
    """Every shape fits the ones beside it: parts of a fused tensor, low-rank pairs, detail copies."""
    wrong = set()
    for pieces in matched.values():
        shapes = [file.shapes[semantic[piece.source]] for piece in pieces]
        if len({(len(shape), shape[1:]) for shape in shapes}) > 1 or () in shapes:
            wrong |= {piece.source for piece in pieces}
    ranks: dict[str, set[int]] = {}
    for key in detail:
        shape = file.shapes[keys[key]]
        source = family.detail_source(key)
        name = split_key(key)
        if source is not None:
            fits = shape == file.shapes[semantic[source]]
        else:
            base = file.shapes[semantic[f"{name.module}.weight"]]
            fits = len(shape) == len(base) == 2 and (shape[1] == base[1] if name.kind == "down" else shape[0] == base[0])
            if fits:
                ranks.setdefault(name.module, set()).add(shape[0] if name.kind == "down" else shape[1])
        if not fits:
            wrong.add(key)
    wrong |= {module for module, found in ranks.items() if len(found) > 1}
    if wrong:
        raise CheckpointError(
            f"{file.path}: {name_some(wrong)} have shapes that do not fit the base layers in the same file. Download it again."
        )


def _half_message(file: TensorFile, family: Family, layout: Layout, missing: set[str], odd: set[str]) -> str:
    parts = [f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({name_some(missing)})"] if missing else []
    parts += [f"{counted(len(odd), 'is', 'are')} unknown ({name_some(odd)})"] if odd else []
    shard = " It looks like one shard of several: merge all shards into one file first." if "-of-" in file.path.name else ""
    return (
        f"{file.path} looks like {family.title}, {layout.value}, but {' and '.join(parts)}. Expected every tensor of the "
        f"model and nothing else; download it again or load the unchanged release file.{shard}"
    )


def semantic_state_dict(
    file: TensorFile, contents: Contents, progress: Progress | None = None, copied: bool = True
) -> dict[str, Tensor]:
    """The base (semantic) weights of a diffusers-layout file in native names, each tensor read once.

    Args:
        copied: read them all; else only fused tensors are in memory, the others are views of the file, to be copied by the caller.
    """
    return dict(each_native(file, contents, progress, None if copied else views(file).__getitem__))


def each_native(
    file: TensorFile, contents: Contents, progress: Progress | None = None, read: Callable[[str], Tensor] | None = None
) -> Iterable[tuple[str, Tensor]]:
    """The base's tensors in native names, one at a time; `read` gives the file's if not the file.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    sources = [piece.source for pieces in contents.matched.values() for piece in pieces]
    reader = each_read(file, sources, progress, read)
    for target, pieces in contents.matched.items():
        tensors = dict(next(reader) for _ in pieces)
        check_finite(file, tensors)
        yield target, fuse(pieces, tensors)


def detail_expert(file: TensorFile, contents: Contents) -> Expert:
    """The detail expert inside a release.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    tensors = {bare: file.read(key) for key, bare in contents.detail.items()}
    check_finite(file, tensors)
    return expert_from_release(contents.family, tensors)


def check_finite(file: TensorFile, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers.

    Raises:
        CheckpointError: NaN or infinite values, with their keys.
    """
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if broken:
        raise CheckpointError(f"{file.path}: {name_some(broken)} hold NaN or infinite values. Download the file again.")
