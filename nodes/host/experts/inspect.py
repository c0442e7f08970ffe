"""Inspect a file, a MODEL, or both, without loading or moving anything."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ....dcm_core.errors import DCMError, counted
from ....dcm_core.experts.expert import FILE_PREFIX, LowRank, split_fused
from ....dcm_core.experts.match import Target
from ....dcm_core.experts.updates import Update, routed_updates
from ....dcm_core.families import Family
from ....dcm_core.families.lora_names import unwrapped
from ....dcm_core.inspection.inspect import in_lines, inspect_file
from ....dcm_core.inspection.magnitude import Base, Change, Profile, file_profile, is_plain, make_profile, measure
from ....dcm_core.inspection.plot import plot_profile
from ....dcm_core.text import given
from ..folders import LORAS, MODELS, NONE, files, path_of
from ..progress import byte_progress
from ..sampling.run import as_image
from .attach import compute_dtype, diffusion_model, model_family, module_shapes
from .prepare import is_own
from .route import KEY, AttachedExperts, attached_experts


def file_names() -> list[str]:
    """The options, "none" first; the folder is part of each name."""
    return [NONE, *(f"{category}/{name}" for category in (MODELS, LORAS) for name in files(category))]


def path_of_choice(choice: Any) -> Path:
    """Full path of one of `file_names`.

    Raises:
        DCMError: a name without its folder.
    """
    category, _, name = choice.partition("/") if isinstance(choice, str) else ("", "", "")
    if category not in (MODELS, LORAS):
        raise DCMError(
            f"file is {given(choice)}; expected none, or a file in models/{MODELS} or models/{LORAS}, "
            f"such as {LORAS}/my_expert.safetensors. Choose it from the list."
        )
    return path_of(category, name, "file")


def inspect(choice: str, model: Any, node_id: str | None = None) -> tuple[str, Tensor]:
    """A description of the file and the MODEL, and a picture of the experts of each.

    Returns:
        The text, and pictures of shape (1 or 2, height, width, 3).

    Raises:
        DCMError: neither a file nor a MODEL, or a file that cannot be read.
    """
    if choice == NONE and model is None:
        raise DCMError(
            "There is nothing to inspect: file is none and no model is connected. Choose a file, or connect a model."
        )
    found: list[tuple[str, str, Profile | None]] = []
    if choice != NONE:
        found.append(_look_at_file(path_of_choice(choice), model, node_id))
    if model is not None:
        found.append(_look_at_model(model, node_id))
    texts = [in_lines(profile.summary()) if profile is not None else "" for _, _, profile in found]
    text = "\n\n".join("\n".join(filter(None, (said, more))) for (_, said, _), more in zip(found, texts, strict=True))
    drawn = [(title, profile) for title, _, profile in found if profile is not None] or [(found[0][0], None)]
    return text, torch.cat([as_image(plot_profile(profile, title)) for title, profile in drawn])


def _look_at_file(path: Path, model: Any, node_id: str | None) -> tuple[str, str, Profile | None]:
    """(title, text, how much its expert changes)."""
    target = base = None
    if model is not None:
        target, base = Target(type(model.model).__name__, model_family(model), module_shapes(model)), model_base(model)
    inspection = inspect_file(path, target, byte_progress(node_id))
    profile = None
    if inspection.problem is None:
        profile = file_profile(path, target, base, byte_progress(node_id))
    return path.name, str(inspection), profile


def _look_at_model(model: Any, node_id: str | None) -> tuple[str, str, Profile | None]:
    """(title, text, how much its experts change)."""
    family, facts = model_family(model), attached_experts(model)
    name = type(model.model).__name__
    strengths = _strengths(model, facts) if facts else {}
    weights = Counter(_kind(tensor) for tensor in diffusion_model(model).parameters())
    experts = sum(patcher.model_size() for patcher in model.get_additional_models_with_key(KEY))
    own = facts.own_patches if facts else {}
    others = {
        key: count
        for key, patches in model.patches.items()
        if (count := sum(not is_own(patch, own.get(key, ())) for patch in patches))
    }
    text = in_lines(
        {
            "model": name,
            "family": family.title if family else "unknown",
            "size": f"{model.model_size() / 1e9:.3f} GB"
            + (f", routed experts {experts / 1e9:.3f} GB" if experts else ""),
            "dtypes": ", ".join(f"{kind} x {count}" for kind, count in weights.most_common())
            + f", computes in {_short(compute_dtype(model))}",
            "experts": _experts_in_words(facts),
            **(_lines(facts, strengths) if facts else {}),
            "boundary": f"{facts.boundary:g}" if facts and facts.boundary else None,
            "timesteps": json.dumps(facts.timesteps) if facts and facts.timesteps else None,
            "LoRAs": _patches_in_words(others) if others else "none",
        }
    )
    if family is None or facts is None:
        return name, text, None
    changes = model_changes(model, facts, family, node_id)
    return f"{name} with its experts at their strengths", text, make_profile(changes, family, module_shapes(model))


def _kind(tensor: Tensor) -> str:
    return _short(tensor.dtype) if type(tensor) in (Tensor, nn.Parameter) else type(tensor).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lines(facts: AttachedExperts, strengths: Mapping[str, float]) -> dict[str, str]:
    """A line for each of the two experts, or for each row of a table."""
    if facts.boundary is not None:
        return {side: f"{line}, strength {strengths.get(side, 0):g}" for side, line in facts.experts.items()}
    return {f"row {number}": line for number, line in enumerate(facts.lines, 1)}


def _patches_in_words(patches: Mapping[str, int]) -> str:
    return f"{counted(sum(patches.values()), 'other patch', 'other patches')} on {counted(len(patches), 'tensor')}"


def _experts_in_words(facts: AttachedExperts | None) -> str:
    if facts is None:
        return "none attached"
    if facts.boundary is None:
        return f"table of {counted(len(facts.rows), 'row')}"
    how = "stacked, detail on top of semantic" if facts.stacked else "independent, each on its side"
    return f"{' and '.join(facts.experts)} ({how})"


def _strengths(model: Any, facts: AttachedExperts) -> dict[str, float]:
    """Expert -> strength. For a stacked semantic expert it is in its patches."""
    stacked = [strength for _, strength in _stacked_patches(model, facts)]
    return ({"semantic": stacked[0]} if stacked else {}) | dict(facts.strengths)


def _stacked_patches(model: Any, facts: AttachedExperts) -> Iterator[tuple[tuple[str, Any], float]]:
    """((base tensor, patch), strength) for a semantic expert that is an ordinary LoRA."""
    for key, own in facts.own_patches.items():
        for patch in model.patches.get(key, []):
            if is_own(patch, own):
                yield (key.removeprefix(FILE_PREFIX), patch[1]), patch[0]


def model_changes(
    model: Any, facts: AttachedExperts, family: Family, node_id: str | None = None
) -> dict[str, list[Change]]:
    """What each attached expert changes, at its strength."""
    updates: list[tuple[str, float, Update]] = []
    for (name, patch), strength in _stacked_patches(model, facts):
        if strength:
            updates += (("semantic", strength, update) for update in _patch_updates(name, patch, family))
    for patcher in model.get_additional_models_with_key(KEY):
        name = patcher.model.name
        updates += (
            (name, facts.strengths[name], u) for u in routed_updates(patcher.model, originals(patcher, patcher.model))
        )
    progress, base = byte_progress(node_id), model_base(model)
    changes: dict[str, list[Change]] = {name: [] for name in facts.experts}
    for done, (side, strength, update) in enumerate(updates):
        progress(done, len(updates))
        changes[side].append(measure(update, base, strength))
    return changes


def _patch_updates(name: str, patch: Any, family: Family) -> Iterator[Update]:
    """One of the host's patches on a base tensor."""
    if isinstance(patch, LoRAAdapter):
        up, down, alpha = patch.weights[:3]
        pair = LowRank(down, up, 1.0 if alpha is None else alpha / down.shape[0])
        for update in split_fused(pair, name.removesuffix(".weight"), family):
            yield Update(name, (update,), start=update.start)
    else:
        kind, (tensor, *_) = patch
        yield Update(name, **{"replaced" if kind == "set" else "diff": tensor})


def originals(patcher: Any, module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameter name -> its value without patches, which the host backs up while they are in the weights."""
    found = {}
    for name, tensor in module.named_parameters():
        name = unwrapped(name)
        hooked, kept = patcher.hook_backup.get(prefix + name), patcher.backup.get(prefix + name)
        found[name] = hooked[0] if hooked else kept.weight if kept else tensor
    return found


def model_base(model: Any) -> Base:
    """A MODEL's own weights, wherever they are. Quantised ones (fp8, GGUF, packed) are not available."""
    tensors = originals(model, diffusion_model(model), FILE_PREFIX)

    def rows_of(name: str, start: int, rows: int) -> Tensor | None:
        tensor = tensors.get(name)
        plain = type(tensor) in (Tensor, nn.Parameter) and is_plain(tensor.dtype) and not tensor.is_meta
        return tensor[start : start + rows] if plain else None

    return rows_of
