"""Read an expert from LoRA files of any common naming: ours, ComfyUI, kohya, diffusers, PEFT, the release's own.

Every tensor is placed or named in an error; nothing is dropped.
"""

import json
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import ExpertError, counted, name_some
from .experts import FILE_FORMAT, Expert, LowRank, split_fused
from .families import FAMILIES, Family
from .keymap import Shape
from .lora_names import Kind, Shapes, count_known, is_release_part
from .match import NO_LAYER, OTHER_KIND, Site, find_sites, tensor_name, wrong_kinds
from .routing import Side, check_boundary
from .updates import DefaultScale, Update, site_updates


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
    sites = _places({key: tuple(tensor.shape) for key, tensor in tensors.items()}, family, shapes)
    _check_values(tensors)
    default_scale = DefaultScale(family, metadata, peft_config, released=is_release_part(tensors, family))
    low_rank: dict[str, list[LowRank]] = {}
    replaced: dict[str, Tensor] = {}
    diff: dict[str, Tensor] = {}
    for site in sites:
        held = {kind: tensors[key] for kind, key in site.keys.items()}
        for update in site_updates(site.piece, held, family, shapes, default_scale):
            _gather(update, shapes[update.name], low_rank, replaced, diff)
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


def _places(keys: Mapping[str, Shape], family: Family, shapes: Shapes) -> list[Site]:
    """Where every tensor belongs; none is left out."""
    sites, strangers = find_sites(keys, family, shapes)
    if unsupported := strangers.get(OTHER_KIND):
        raise ExpertError(
            f"{counted(len(unsupported), 'tensor is', 'tensors are')} of a kind that cannot be routed ({name_some(unsupported)}). "
            "Expected plain LoRA pairs, .diff, .diff_b or .set_weight; convert the file to a plain LoRA first."
        )
    if collided := {name for site in sites for kind, key in site.again for name in (key, site.keys[kind])}:
        raise ExpertError(f"{name_some(collided)} are for the same tensor. Expected one name for each; merge the adapters first.")
    if unplaced := strangers.get(NO_LAYER):
        raise ExpertError(_unplaced_message(unplaced, len(keys), family))
    if not sites:
        raise ExpertError("The file holds no tensor. Expected the LoRA of an expert.")
    for site in sites:
        if wrong := wrong_kinds(site, keys, shapes):
            raise _refusal(site, wrong, keys, shapes)
    return sites


def _unplaced_message(unplaced: list[str], count: int, family: Family) -> str:
    for other in FAMILIES.values():
        if other is not family and count_known(other, unplaced) > len(unplaced) // 2:
            return (
                f"This expert is for {other.title} ({name_some(unplaced)}), the model is {family.title}. "
                f"Load the expert made for {family.title}."
            )
    return (
        f"{len(unplaced)} of {counted(count, 'tensor')} fit nothing in this {family.title} model: {name_some(unplaced)}. "
        "Expected LoRA keys in ComfyUI, kohya, diffusers or PEFT naming, made for a model of the same size."
    )


def _refusal(site: Site, wrong: Mapping[Kind, str], keys: Mapping[str, Shape], shapes: Shapes) -> ExpertError:
    """What is wrong with a site's tensors."""
    held = site.keys
    pair = [kind for kind in ("down", "up") if kind in held]
    if len(pair) == 1:
        return ExpertError(f"{name_some(held.values())} is half of a low-rank pair. Save or download the file again.")
    if "alpha" in held and not pair:
        return ExpertError(f"{held['alpha']} has no low-rank pair. Save or download the file again.")
    kind = next(iter(pair if wrong.keys() & pair else wrong))
    name, given = tensor_name(site.piece, kind, shapes), tuple(keys[held[kind]])
    if kind in pair:
        return _other_size(f"{name_some(held.values())} have shapes {given} and {tuple(keys[held['up']])}", site.piece.target, shapes[name])
    if kind == "alpha":
        return ExpertError(f"{held[kind]} has shape {given}; an alpha is one number. Save the expert again.")
    if site.piece.part is not None and kind in ("set_weight", "set_bias"):
        return ExpertError(f"{held[kind]} replaces only some rows of the fused {name}. Convert the expert to native names first.")
    return _other_size(f"{held[kind]} has shape {given}", name, shapes[name])


def _gather(
    update: Update, shape: Shape, low_rank: dict[str, list[LowRank]], replaced: dict[str, Tensor], diff: dict[str, Tensor]
) -> None:
    """Put what a file does to the tensor of this shape with the rest."""
    name, pair = update.name, update.low_rank
    if update.replaced is not None:
        replaced[name] = update.replaced
    if pair is not None and len(shape) == 2:
        low_rank.setdefault(name.removesuffix(".weight"), []).append(pair)
    elif pair is not None:
        full = pair.scale * pair.up.float().flatten(1) @ pair.down.float().flatten(1)
        diff[name] = full.reshape(tuple(shape))
    if update.diff is not None and name not in diff and update.rows == shape[0]:
        diff[name] = update.diff
    elif update.diff is not None:
        whole = diff.setdefault(name, update.diff.new_zeros(tuple(shape)))
        whole[update.start : update.start + update.rows] += update.diff


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ExpertError(
            f"NaN or infinite values in {counted(len(broken), 'tensor')}: {name_some(broken)}. Download or train the file again."
        )


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
        f"The file holds {counted(len(tensors), 'tensor')} but says it was written with {expected}{hint}. Convert or download it again."
    )
