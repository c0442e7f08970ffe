"""Read an expert from LoRA files of any common naming: ours, ComfyUI, kohya, diffusers, PEFT, the release's own.

Every tensor is placed or named in an error; nothing is dropped.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ExpertError, name_some
from .experts import FILE_FORMAT, Expert, LowRank, place_low_rank, split_update
from .families import FAMILIES, Family
from .keymap import Piece
from .lora_names import LoraKey, ModuleNames, Shapes, candidates, count_known, split_key
from .routing import Side, check_boundary

RELEASE_ADAPTER = "lora1"


@dataclass
class Site:
    """The tensors a file holds for one of its modules."""

    piece: Piece
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None


def read_expert(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    role: Side,
    family: Family,
    shapes: Shapes,
    peft_config: Mapping | None = None,
) -> Expert:
    """Read an expert for a model of `family`.

    Args:
        tensors: the file's content.
        metadata: the file's metadata; `dcm.*` says what the file is, `lora_adapter_metadata` holds diffusers' alpha.
        role: the side it is to be used for.
        shapes: native tensor name -> shape of the base model.
        peft_config: a PEFT folder's adapter_config.json, for its alpha.

    Raises:
        ExpertError: wrong family or role; keys that fit no module, half pairs, unsupported kinds (DoRA, LoHa, LoKr ...),
            wrong shapes, NaN or infinite values, missing keys in a file of ours.
    """
    check_facts(metadata, role, family)
    sites = _collect(tensors, family, shapes)
    _check_values(tensors)
    default_scale = DefaultScale(family, metadata, peft_config, released=is_release_part(tensors, family))
    low_rank: dict[str, list[LowRank]] = {}
    replaced: dict[str, Tensor] = {}
    diff: dict[str, Tensor] = {}
    for site in sites:
        _place(site, shapes, default_scale, low_rank, replaced, diff)
    expert = Expert(
        family.name,
        role,
        {module: split_fused(module, updates, family) for module, updates in low_rank.items()},
        replaced,
        diff,
        boundary=check_boundary(float(metadata["dcm.boundary"])) if "dcm.boundary" in metadata else None,
        timesteps=tuple(json.loads(metadata["dcm.timesteps"])) if "dcm.timesteps" in metadata else None,
    )
    if metadata.get("dcm.format"):
        _check_complete(tensors, metadata, shapes)
    return expert


def check_facts(metadata: Mapping[str, str], role: Side, family: Family) -> None:
    """Refuse a file of ours that says it is something else.

    Raises:
        ExpertError: another family, another role, or a newer format.
    """
    said_family, said_role = metadata.get("dcm.family", family.name), metadata.get("dcm.expert", role)
    if said_family != family.name:
        title = FAMILIES[said_family].title if said_family in FAMILIES else said_family
        raise ExpertError(f"This expert is for {title}, the model is {family.title}. Load the expert made for {family.title}.")
    if said_role != role:
        raise ExpertError(f"This holds a {said_role} expert but is given as the {role} expert. Choose it as the {said_role} expert.")
    if metadata.get("dcm.format", FILE_FORMAT) != FILE_FORMAT:
        raise ExpertError(f"This expert file has format {metadata['dcm.format']}; this version reads {FILE_FORMAT}. Update the node pack.")


def check_sizes(expert: Expert, shapes: Shapes) -> None:
    """Refuse an expert that was made for a model of another size.

    Raises:
        ExpertError: a tensor that the model does not have, or has in another shape.
    """
    for module, updates in expert.low_rank.items():
        shape = tuple(shapes.get(f"{module}.weight", ()))
        for update in updates:
            # a fused tensor's row blocks are as high as its input is wide, but for the last
            heights = (*shape[1:], shape[0] - update.start) if shape else ()
            if tuple(update.down.shape[1:]) != shape[1:] or update.up.shape[0] not in heights:
                raise _other_size(f"{module}'s pair has shapes {tuple(update.down.shape)} and {tuple(update.up.shape)}", module, shape)
    for name, tensor in (*expert.replaced.items(), *expert.diff.items()):
        if tuple(tensor.shape) != (shape := tuple(shapes.get(name, ()))):
            raise _other_size(f"{name} has shape {tuple(tensor.shape)}", name, shape)


def _other_size(given: str, name: str, shape: Sequence[int]) -> ExpertError:
    says = f"the model's {name} is {tuple(shape) or 'absent'}"
    return ExpertError(f"{given}; {says}. Use an expert made for a model of this size.")


def is_release_part(tensors: Iterable[str], family: Family) -> bool:
    """True if the file follows the release's conventions, so that a missing alpha means the release's scale."""
    return any(
        family.detail_source(key) or ((name := split_key(key)) and name.adapter == RELEASE_ADAPTER) for key in tensors
    )


def _collect(tensors: Mapping[str, Tensor], family: Family, shapes: Shapes) -> list[Site]:
    names = ModuleNames(family, shapes)
    sites: dict[str, Site] = {}
    unplaced, unsupported, collided = [], [], []
    for key, tensor in tensors.items():
        name = name_of(key, family)
        piece = names.find(name.module) if name else None
        if name is not None and name.kind == "unsupported":
            unsupported.append(key)
        elif piece is None or (name.kind in ("down", "up") and not shapes.keys() & {piece.target, f"{piece.target}.weight"}):
            unplaced.append(key)
        else:
            site = sites.setdefault(f"{piece.target}|{piece.part}", Site(piece, adapter=name.adapter))
            if name.kind in site.tensors:
                collided += [key, site.keys[name.kind]]
            site.tensors[name.kind], site.keys[name.kind] = tensor, key
    if unsupported:
        raise ExpertError(
            f"{len(unsupported)} tensors are of a kind that cannot be routed ({name_some(unsupported)}). Expected plain LoRA pairs, "
            ".diff, .diff_b or .set_weight; convert the file to a plain LoRA first."
        )
    if collided:
        raise ExpertError(f"{name_some(set(collided))} are for the same tensor. Expected one name for each; merge the adapters first.")
    if unplaced:
        raise ExpertError(_unplaced_message(unplaced, len(tensors), family))
    if not sites:
        raise ExpertError("The file holds no tensor. Expected the LoRA of an expert.")
    return list(sites.values())


def name_of(key: str, family: Family) -> LoraKey | None:
    """The key taken apart; the release's detail copies count as replacements."""
    for name in candidates(key):
        source = family.detail_source(name)
        if source is not None:
            module, _, param = source.rpartition(".")
            return LoraKey(module, "set_bias" if param == "bias" else "set_weight", RELEASE_ADAPTER)
    return split_key(key)


def _unplaced_message(unplaced: list[str], count: int, family: Family) -> str:
    for other in FAMILIES.values():
        if other is not family and count_known(other, unplaced) > len(unplaced) // 2:
            return (
                f"This expert is for {other.title} ({name_some(unplaced)}), the model is {family.title}. "
                f"Load the expert made for {family.title}."
            )
    return (
        f"{len(unplaced)} of {count} tensors fit nothing in this {family.title} model: {name_some(unplaced)}. Expected LoRA "
        "keys in ComfyUI, kohya, diffusers or PEFT naming, made for a model of the same size."
    )


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ExpertError(f"{len(broken)} tensors hold NaN or infinite values: {name_some(broken)}. Download or train the file again.")


class DefaultScale:
    """alpha / rank of a pair that stores no alpha: PEFT's or diffusers' configuration, else the release's, else 1."""

    def __init__(self, family: Family, metadata: Mapping[str, str], peft_config: Mapping | None, released: bool):
        self.config = peft_config or _diffusers_config(metadata) or {}
        self.fallback = family.lora_scale if released else 1.0

    def __call__(self, module: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha")
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        if alpha is None:
            return self.fallback
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _diffusers_config(metadata: Mapping[str, str]) -> dict:
    """The LoRA configuration diffusers stores as JSON in a file's metadata, keys without their `transformer.`."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise ExpertError(f"The metadata `lora_adapter_metadata` is no JSON ({error}). Save the LoRA again.") from error
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def _place(
    site: Site,
    shapes: Shapes,
    default_scale: DefaultScale,
    low_rank: dict[str, list[LowRank]],
    replaced: dict[str, Tensor],
    diff: dict[str, Tensor],
) -> None:
    """Put one module's tensors where they belong."""
    piece, tensors = site.piece, site.tensors
    weight = piece.target if piece.target in shapes else f"{piece.target}.weight"
    bias = f"{piece.target}.bias"
    if ("down" in tensors) != ("up" in tensors):
        raise ExpertError(f"{name_some(site.keys.values())} is half of a low-rank pair. Save or download the file again.")
    if "alpha" in tensors and "down" not in tensors:
        raise ExpertError(f"{site.keys['alpha']} has no low-rank pair. Save or download the file again.")
    if "down" in tensors:
        update = _low_rank(site, shapes[weight], default_scale)
        if len(shapes[weight]) > 2:
            full = update.scale * update.up.float().flatten(1) @ update.down.float().flatten(1)
            diff[weight] = full.reshape(tuple(shapes[weight]))
        else:
            low_rank.setdefault(piece.target, []).append(update)
    for kind, name, into in (
        ("set_weight", weight, replaced),
        ("set_bias", bias, replaced),
        ("diff", weight, diff),
        ("diff_b", bias, diff),
    ):
        if kind in tensors:
            _place_full(site, kind, name, shapes, into)


def _low_rank(site: Site, shape: Sequence[int], default_scale: DefaultScale) -> LowRank:
    down, up, alpha = site.tensors["down"], site.tensors["up"], site.tensors.get("alpha")
    piece = site.piece
    room = shape[0] if piece.part is None else shape[0] - piece.part * shape[1]
    rows_fit = up.ndim == down.ndim == len(shape) and (up.shape[0] == room if piece.part is None else up.shape[0] <= room)
    if not (rows_fit and down.shape[0] == up.shape[1] > 0 and tuple(down.shape[1:]) == tuple(shape[1:])):
        raise _other_size(
            f"{name_some(site.keys.values())} have shapes {tuple(down.shape)} and {tuple(up.shape)}", piece.target, shape
        )
    if alpha is not None and alpha.numel() != 1:
        raise ExpertError(f"{site.keys['alpha']} has shape {tuple(alpha.shape)}; an alpha is one number. Save the expert again.")
    scale = default_scale(piece.source, down.shape[0]) if alpha is None else alpha.item() / down.shape[0]
    return place_low_rank(piece, down, up, scale)


def _place_full(site: Site, kind: str, name: str, shapes: Shapes, into: dict[str, Tensor]) -> None:
    """Put a whole tensor, or a fused tensor's rows, into `into[name]`."""
    tensor, part = site.tensors[kind], site.piece.part
    shape = tuple(shapes.get(name, ()))
    if part is not None and kind.startswith("set"):
        raise ExpertError(f"{site.keys[kind]} replaces only some rows of the fused {name}. Convert the expert to native names first.")
    if site.piece.swap_halves:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    if part is not None and shape:
        width = shapes[f"{site.piece.target}.weight"][1]
        whole = into.setdefault(name, tensor.new_zeros(shape))
        start, stop = part * width, part * width + tensor.shape[0]
        if tuple(whole[start:stop].shape) == tuple(tensor.shape):
            whole[start:stop] = tensor
            return
    elif tuple(tensor.shape) == shape:
        into[name] = tensor
        return
    raise _other_size(f"{site.keys[kind]} has shape {tuple(tensor.shape)}", name, shape)


def split_fused(module: str, updates: Sequence[LowRank], family: Family) -> tuple[LowRank, ...]:
    """A module's updates in row order, one for each row block they were stacked from."""
    parts = len(family.key_map.sources_of(module))
    ordered = sorted(updates, key=lambda update: update.start)
    return tuple(piece for update in ordered for piece in split_update(update, parts))


def _check_complete(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shapes: Shapes) -> None:
    """A file of ours has the same keys in every block it touches; name what a cut-down one lacks."""
    expected = int(metadata.get("dcm.tensors", len(tensors)))
    if len(tensors) == expected:
        return
    templates = {re.sub(r"\.\d+\.", ".{n}.", key, count=1) for key in tensors}
    numbered = {template for template in templates if "{n}" in template}
    depth = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"(?:double_|single_)?blocks\.(\d+)\.", name))), default=-1)
    missing = {t.replace("{n}", str(i)) for t in numbered for i in range(depth)} - set(tensors)
    hint = f", among them probably {name_some(missing)}" if missing and len(tensors) < expected else ""
    raise ExpertError(
        f"The file holds {len(tensors)} tensors but says it was written with {expected}{hint}. Convert or download it again."
    )
