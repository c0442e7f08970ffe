"""Read an expert from a release, or from a LoRA file in any common naming: ours, ComfyUI, kohya, diffusers, PEFT.

Every tensor is used, left out with a note if the model does not need it, or named in an error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ExpertError, counted, name_some
from ..families import FAMILIES, Family
from ..families.keymap import Shape
from ..families.lora_names import LOW_RANK, Kind, Shapes, count_known, is_release_part
from ..files.checkpoint import Contents, release_metadata
from ..files.metadata import FORMAT, ExpertMetadata, read_metadata
from ..files.tensor_file import TensorFile
from ..files.values import is_finite
from ..routing import Side
from ..text import given
from .expert import Expert, LowRank
from .match import HALF, NO_LAYER, ROWS, TEXT_ENCODER, Reasons, Site, find_sites, tensor_name, wrong_kinds
from .updates import DefaultScale, Update, site_updates


class WrongSideError(ExpertError):
    """An expert for the other side. `side` is its own side."""

    def __init__(self, side: str, wanted: str):
        super().__init__(f"This is a {side} expert, not a {wanted} expert. Use it as the {side} expert.")
        self.side = side


def read_expert(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    role: Side,
    family: Family,
    shapes: Shapes,
    path: Path | None = None,
) -> Expert:
    """Read an expert for a model of `family`.

    Args:
        tensors: the file's tensors.
        metadata: the file's metadata. `dcm.*` entries describe the expert; others may contain its trainer's settings.
        role: the side to use it for.
        shapes: native tensor name -> shape of the base model.
        path: path of the file. Its trainer may have written settings beside it.

    Raises:
        ExpertError: wrong family or role, or unreadable settings or metadata. Also for tensors that do not fit: unknown keys, half
            a low-rank update, other methods (DoRA, LoHa, LoKr ...), wrong shapes, NaN or infinite values. In our own
            files, also for missing keys.
    """
    parsed = read_metadata(metadata)
    check_metadata(parsed, role, family)
    sites, left_out = find_places({key: tuple(tensor.shape) for key, tensor in tensors.items()}, family, shapes)
    check_values({key: tensors[key] for site in sites for key in site.keys.values()})
    check_reshapes(sites, tensors, shapes)
    default_scale = DefaultScale(family, metadata, path, released=is_release_part(tensors, family))
    updates = (
        update
        for site in sites
        for update in site_updates(
            site.piece, {kind: tensors[key] for kind, key in site.keys.items()}, family, shapes, default_scale
        )
    )
    low_rank, replaced, diff = gathered(updates, shapes)
    if parsed.format is not None:
        check_complete(tensors, parsed, shapes)
    return Expert(
        family.name,
        role,
        low_rank,
        replaced,
        diff,
        boundary=parsed.boundary,
        timesteps=parsed.timesteps,
        notes=(*default_scale.notes, *(_left_out_note(why, keys) for why, keys in left_out.items())),
        pair=parsed.pair,
        source="" if path is None else path.name,
    )


def read_release(file: TensorFile, contents: Contents, tensors: Mapping[str, Tensor] | None = None) -> Expert:
    """The detail expert inside a release.

    Args:
        tensors: the file's tensors; None reads them.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    family = contents.family
    read = file.read if tensors is None else tensors.__getitem__
    found = {bare: read(key) for key, bare in contents.detail.items()}
    try:
        expert = read_expert(found, {}, "detail", family, contents.native_shapes(file))
    except ExpertError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    parsed = release_metadata(file, family)
    # the scale is always the family's, so no note is needed
    return replace(expert, boundary=parsed.boundary, timesteps=parsed.timesteps, notes=())


def _left_out_note(why: str, keys: Sequence[str]) -> str:
    what = f"{why}, which belongs on the text encoder" if why == TEXT_ENCODER else why
    return f"left out {counted(len(keys), 'tensor')}: {what} ({name_some(keys)})"


def check_metadata(metadata: ExpertMetadata, role: Side, family: Family) -> None:
    """Refuse a file whose metadata says that it is for something else.

    Raises:
        ExpertError: it is for another family or role, or in a newer format.
    """
    if metadata.family not in (None, family.name):
        title = FAMILIES[metadata.family].title if metadata.family in FAMILIES else given(metadata.family)
        raise ExpertError(
            f"This expert is for {title}, but the model is {family.title}. Load an expert for {family.title}."
        )
    if metadata.side not in (None, role):
        raise WrongSideError(metadata.side, role)
    if metadata.format not in (None, FORMAT):
        raise ExpertError(
            f"This expert file has format {given(metadata.format)}; this version reads format {FORMAT}. Update ComfyUI-DCM."
        )


def check_sizes(expert: Expert, shapes: Shapes) -> None:
    """Refuse an expert for a model of another size.

    Raises:
        ExpertError: the model does not have one of its tensors, or has it in another shape.
    """
    for module, updates in expert.low_rank.items():
        shape = tuple(shapes.get(f"{module}.weight", ()))
        for update in updates:
            # in a fused tensor, each row block but the last has as many rows as the input has columns
            heights = (*shape[1:], shape[0] - update.start) if shape else ()
            if tuple(update.down.shape[1:]) != shape[1:] or update.up.shape[0] not in heights:
                raise _other_size(
                    f"The LoRA of {module} has shapes {tuple(update.down.shape)} and {tuple(update.up.shape)}",
                    module,
                    shape,
                )
    for name, tensor in (*expert.replaced.items(), *expert.diff.items()):
        if tuple(tensor.shape) != (shape := tuple(shapes.get(name, ()))):
            raise _other_size(f"{name} has shape {tuple(tensor.shape)}", name, shape)


def _other_size(found: str, name: str, shape: Sequence[int]) -> ExpertError:
    says = f"the model's {name} is {tuple(shape) or 'absent'}"
    return ExpertError(f"{found}; {says}. Use an expert made for a model of this size.")


def find_places(keys: Mapping[str, Shape], family: Family, shapes: Shapes) -> tuple[list[Site], Reasons]:
    """Where every tensor belongs, and which ones can be left out.

    Raises:
        ExpertError: as for `read_expert`, for names and shapes.
    """
    sites, left_out, strangers = find_sites(keys, family, shapes)
    unplaced = strangers.pop(NO_LAYER, [])
    if strangers:
        raise ExpertError(_unroutable_message(strangers))
    if collided := _collided(sites, shapes):
        raise ExpertError(
            f"{name_some(collided)} are for the same tensor; expected one key for each. Merge the adapters first."
        )
    if unplaced:
        raise ExpertError(_unplaced_message(unplaced, len(keys), family))
    if not sites and left_out:
        why, found = next(iter(left_out.items()))
        raise ExpertError(
            f"The file has no tensors for this {family.title} model, only {why} ({name_some(found)}). Choose another file."
        )
    if not sites:
        raise ExpertError("The file has no tensors; expected the LoRA of an expert. Choose another file.")
    for site in sites:
        if wrong := wrong_kinds(site, keys, shapes):
            raise _refusal(site, wrong, keys, shapes)
    return sites, left_out


def _collided(sites: Sequence[Site], shapes: Shapes) -> set[str]:
    """Keys that are for the same tensor under different names."""
    collided = {name for site in sites for kind, key in site.again for name in (key, site.keys[kind])}
    first: dict[tuple[str, int | None], str] = {}
    for site in sites:
        for kind, key in site.keys.items():
            tensor = tensor_name(site.piece, kind, shapes), site.piece.part
            if kind not in LOW_RANK and (other := first.setdefault(tensor, key)) != key:
                collided |= {other, key}
    return collided


def _unroutable_message(strangers: Reasons) -> str:
    kinds = " and ".join(
        f"{counted(len(keys), f'{method} tensor')} ({name_some(keys)})" for method, keys in sorted(strangers.items())
    )
    return (
        f"The file has {kinds}, which cannot be used here. Expected plain LoRA, .diff, .diff_b and .set_weight. "
        "Convert the file to plain LoRA, or load it with LoraLoaderModelOnly for all steps."
    )


def _unplaced_message(unplaced: list[str], count: int, family: Family) -> str:
    for other in FAMILIES.values():
        if other is not family and count_known(other, unplaced) > len(unplaced) // 2:
            return (
                f"This expert is for {other.title} ({name_some(unplaced)}), but the model is {family.title}. "
                f"Load an expert for {family.title}."
            )
    return (
        f"{len(unplaced)} of {counted(count, 'tensor')} do not fit this {family.title} model: {name_some(unplaced)}. "
        "Expected LoRA keys in ComfyUI, kohya, diffusers or PEFT naming, made for a model of the same size."
    )


def _refusal(site: Site, wrong: Mapping[Kind, str], keys: Mapping[str, Shape], shapes: Shapes) -> ExpertError:
    """The error for a site whose tensors do not fit."""
    held, target = site.keys, site.piece.target
    parts = [kind for kind in LOW_RANK if kind in held]
    if HALF in wrong.values():
        names = name_some(held[kind] for kind in parts)
        sizes = " and ".join(str(tuple(keys[held[kind]])) for kind in ("down", "up") if kind in held)
        return ExpertError(
            f"{names} is half of a LoRA layer"
            + (f", or its halves do not fit each other: {sizes}" if sizes else "")
            + ". Save or download the file again."
        )
    kind = next(kind for kind in held if kind in wrong)
    name = tensor_name(site.piece, kind, shapes)
    if kind in ("down", "mid", "up"):
        sizes = " and ".join(str(tuple(keys[held[k]])) for k in ("down", "mid", "up") if k in held)
        return _other_size(f"{name_some(held[k] for k in parts)} have shapes {sizes}", target, shapes[name])
    if kind == "alpha":
        return ExpertError(
            f"{held[kind]} has shape {tuple(keys[held[kind]])}; expected a single number. Save the expert again."
        )
    if wrong[kind] == ROWS:
        return ExpertError(
            f"{held[kind]} replaces only some rows of the fused {name}. Convert the expert to native names first."
        )
    return _other_size(f"{held[kind]} has shape {tuple(keys[held[kind]])}", name, shapes[name])


def check_reshapes(sites: Sequence[Site], tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuse a `reshape_weight` other than the layer's own shape: an expert cannot change the size of a layer."""
    for site in sites:
        key = site.keys.get("reshape")
        name = tensor_name(site.piece, "diff", shapes)
        if key is not None and tensors[key].tolist() != list(shapes[name]):
            raise ExpertError(
                f"{key} changes the shape of {name} to {tensors[key].tolist()}; in the model it is {list(shapes[name])}. "
                "An expert cannot change the size of a layer. Use one made for this model."
            )


def gathered(
    updates: Iterable[Update], shapes: Shapes
) -> tuple[dict[str, tuple[LowRank, ...]], dict[str, Tensor], dict[str, Tensor]]:
    """What the updates do together, as an expert stores it: `low_rank` in row order, `replaced` and `diff`."""
    low_rank: dict[str, list[LowRank]] = {}
    replaced: dict[str, Tensor] = {}
    diff: dict[str, Tensor] = {}
    for update in updates:
        name, shape = update.name, shapes[update.name]
        if update.replaced is not None:
            replaced[name] = update.replaced
        if update.low_rank and len(shape) == 2 and name.endswith(".weight"):
            low_rank.setdefault(name.removesuffix(".weight"), []).extend(update.low_rank)
        elif update.low_rank:
            (factors,) = update.low_rank
            diff[name] = (factors.scale * factors.up.float() @ factors.down.float()).reshape(tuple(shape))
        if update.diff is not None and name not in diff and update.rows == shape[0]:
            diff[name] = update.diff
        elif update.diff is not None:
            whole = diff.setdefault(name, update.diff.new_zeros(tuple(shape)))
            whole[update.start : update.start + update.rows] += update.diff
    in_row_order = {module: tuple(sorted(found, key=attrgetter("start"))) for module, found in low_rank.items()}
    return in_row_order, replaced, diff


def check_values(tensors: Mapping[str, Tensor]) -> None:
    whole = [
        key
        for key, tensor in tensors.items()
        if not tensor.is_floating_point() and not key.endswith((".alpha", ".reshape_weight"))
    ]
    if whole:
        raise ExpertError(
            f"{counted(len(whole), 'tensor')} stored as {tensors[whole[0]].dtype}, not as floating-point numbers: {name_some(whole)}. "
            "Quantised LoRAs are not supported. Use the float16 or bfloat16 version."
        )
    # a float64 value has to fit float32
    broken = [key for key, t in tensors.items() if not is_finite(t.float() if t.dtype is torch.float64 else t)]
    if broken:
        raise ExpertError(
            f"NaN or infinite values in {counted(len(broken), 'tensor')}: {name_some(broken)}. Download or train the file again."
        )


def check_complete(tensors: Mapping[str, Tensor], metadata: ExpertMetadata, shapes: Shapes) -> None:
    """Our own files have the same keys in every block they change. The error names what a truncated file lacks."""
    expected = len(tensors) if metadata.tensors is None else metadata.tensors
    if len(tensors) == expected:
        return
    templates = {re.sub(r"\.\d+\.", ".{n}.", key, count=1) for key in tensors}
    numbered = {template for template in templates if "{n}" in template}
    depth = 1 + max(
        (int(m[1]) for name in shapes if (m := re.match(r"(?:double_|single_)?blocks\.(\d+)\.", name))), default=-1
    )
    missing = {t.replace("{n}", str(i)) for t in numbered for i in range(depth)} - set(tensors)
    hint = f"; probably missing: {name_some(missing)}" if missing and len(tensors) < expected else ""
    raise ExpertError(
        f"The file has {counted(len(tensors), 'tensor')}, but its metadata says {expected}{hint}. Convert or download it again."
    )
