"""Export an expert in diffusers' names: as a PEFT adapter, or as a LoRA file for diffusers pipelines."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, ExpertError, counted, name_some
from .experts.layers import Layer, layers_of
from .experts.sources import at_scale, padded, scaled
from .experts.view import ExpertView
from .families import Family
from .families.lora_names import PEFT_PREFIX
from .files.metadata import level_entries
from .files.tensor_file import Progress
from .files.unfinished import check_room, check_targets, unfinished_file
from .files.values import cast
from .files.writing import Entries, file_size, write_stream

PEFT, DIFFUSERS = "peft", "diffusers"
TITLES = {PEFT: "PEFT adapter", DIFFUSERS: "diffusers LoRA"}
ADAPTER_MODEL, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How many of the layers left out are named in the report.
MOST_NAMED = 12
# What diffusers pipelines call the model.
TRANSFORMER = "transformer."

Tensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: a folder (PEFT) or a file (diffusers).
        layers: number of diffusers layers with a LoRA.
        replaced: diffusers layers that are replaced.
        left_out: tensors that the format has no form for.
        notes: what the user should know, one sentence each.
    """

    path: Path
    to: str
    layers: int
    replaced: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        more = f", {counted(len(self.replaced), 'layer')} replaced" if self.replaced else ""
        lines = [f"{TITLES[self.to]}: {self.path} (LoRA on {counted(self.layers, 'layer')}{more})", *self.notes]
        if self.left_out:
            layers = {name.removesuffix(".weight").removesuffix(".bias") for name in self.left_out}
            lines.append(
                f"Left out, because a {TITLES[self.to]} has no place for it: {counted(len(self.left_out), 'tensor')} of "
                f"{name_some(layers, MOST_NAMED)}. Results will differ from those of the original expert."
            )
        return "\n".join(lines)


@dataclass
class _Found:
    """What a first pass over an expert found.

    Attributes:
        ranks, alphas: diffusers layer -> value.
        biased: whether a LoRA has a bias.
        replaced: diffusers tensors of replaced layers.
        left_out: tensors of neither kind.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    biased: bool = False
    replaced: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    @property
    def saved(self) -> list[str]:
        """The replaced layers."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.replaced))


def export_expert(
    expert: str | os.PathLike,
    out: str | os.PathLike,
    to: str,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Export:
    """Write an expert as a PEFT adapter or as a LoRA for diffusers' pipelines. One layer is in memory at a time.

    Args:
        expert: an expert file in any naming, or a release, whose detail expert is exported.
        out: the folder of a PEFT adapter, or the file of a diffusers LoRA.
        to: PEFT or DIFFUSERS.
        dtype: dtype of all tensors; None keeps it.
        progress: called with (bytes written, bytes in all); may raise to interrupt.

    Raises:
        CheckpointError: a file cannot be read, or the target cannot be written.
        ExpertError: the expert has no LoRA, or is for an unknown model.
    """
    source, out = Path(expert), Path(out)
    check_targets([source], [out / ADAPTER_MODEL, out / ADAPTER_CONFIG] if to == PEFT else [out], overwrite)
    if dtype is not None and dtype.itemsize == 1:
        raise CheckpointError("dtype is fp8, which does not work for a LoRA. Choose bfloat16, float16 or float32.")
    view = ExpertView(source)
    found = _look(view)
    if to == PEFT:
        root = _root(found, view.family)

        def tensors() -> Tensors:
            return _adapter_tensors(view, found, f"{PEFT_PREFIX}{root}")

        left_out = found.left_out
    else:

        def tensors() -> Tensors:
            return _pipeline_tensors(view, found)

        left_out = found.left_out | set(found.replaced)
    # read twice, so that only one layer is in memory at a time
    entries = {key: (dtype or tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors()}
    stream = ((key, cast(key, tensor, entries[key][0])) for key, tensor in tensors())
    if to == PEFT:
        _write_adapter(out, _config(found, root), entries, stream, _metadata(view), progress)
    else:
        write_stream(out, entries, stream, _metadata(view), progress)
    replaced = tuple(found.saved) if to == PEFT else ()
    how = _loading(out, root) if to == PEFT else f"Load it with pipe.load_lora_weights({str(out)!r})."
    return Export(out, to, len(found.ranks), replaced, tuple(sorted(left_out)), (*view.notes, how))


def _layers(view: ExpertView) -> Iterator[Layer]:
    for module in view.modules:
        yield from layers_of(module, view.updates(module), view.family)[0]


def _look(view: ExpertView) -> _Found:
    found = _Found(left_out=set(view.left_out))
    for module in view.modules:
        layers, left_out = layers_of(module, view.updates(module), view.family)
        found.left_out |= set(left_out)
        for layer in layers:
            found.replaced += [f"{layer.name}.{param}" for param in layer.replaced]
            if layer.pair is not None:
                found.ranks[layer.name] = layer.pair.rank
                found.alphas[layer.name] = layer.pair.scale * layer.pair.rank
                found.biased |= layer.bias is not None
    if not found.ranks:
        raise ExpertError(
            f"{view.file.path} has no LoRA, only replaced layers. Export it as a release, together with its base."
        )
    return found


def _adapter_tensors(view: ExpertView, found: _Found, prefix: str) -> Tensors:
    for layer in _layers(view):
        name = f"{prefix}{layer.name}"
        if layer.pair is not None:
            yield f"{name}.lora_A.weight", layer.pair.down
            yield f"{name}.lora_B.weight", layer.pair.up
            if found.biased:
                yield f"{name}.lora_B.bias", _lora_bias(layer, layer.pair.scale)
        for param, tensor in layer.replaced.items():
            yield f"{name}.{param}", tensor


def _pipeline_tensors(view: ExpertView, found: _Found) -> Tensors:
    """At alpha = rank, which is diffusers' default, and at one rank for all: older versions scale mixed ranks wrongly."""
    rank = max(found.ranks.values())
    for layer in _layers(view):
        if layer.pair is not None:
            pair = padded(at_scale(layer.pair, 1.0), rank)
            yield f"{TRANSFORMER}{layer.name}.lora_A.weight", pair.down
            yield f"{TRANSFORMER}{layer.name}.lora_B.weight", pair.up
            if found.biased:
                yield f"{TRANSFORMER}{layer.name}.lora_B.bias", _lora_bias(layer, 1.0)


def _lora_bias(layer: Layer, scale: float) -> Tensor:
    """The LoRA's bias before it is multiplied by alpha / rank; zeros if the layer has none."""
    if layer.bias is None:
        return layer.pair.up.new_zeros(len(layer.pair.up))
    return scaled(layer.bias, 1 / scale)


def _root(found: _Found, family: Family) -> str:
    """The prefix that layer names need, so that PEFT replaces the right layers.

    PEFT compares the ends of names: HunyuanVideo's `proj_out` would also match the `proj_out` of every single block.
    """
    names = {*found.saved, *found.ranks}
    parts = {piece.optional for name in names if (piece := family.key_map.find_module(name))} | {""}
    others = [rule.source for rule in family.key_map.rules if rule.optional in parts]
    alike = any(other != name and other.endswith(name) for name in found.saved for other in others)
    return TRANSFORMER if alike else ""


def _config(found: _Found, root: str) -> dict[str, Any]:
    # imported here, as it imports transformers
    from peft import LoraConfig

    rank, ranks = _usual(found.ranks, root)
    alpha, alphas = _usual(
        {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in found.alphas.items()}, root
    )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=[f"{root}{name}" for name in found.ranks],
        modules_to_save=[f"{root}{name}" for name in found.saved] or None,
        lora_bias=found.biased,
        inference_mode=True,
    )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _usual(values: Mapping[str, Any], root: str) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the layers with another one. In PEFT, `^` marks the beginning of a name."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{root}{name}": value for name, value in values.items() if value != usual}


def _write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    entries: Entries,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """Both files appear only when both are complete."""
    model, settings = folder / ADAPTER_MODEL, folder / ADAPTER_CONFIG
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    sizes = {model: file_size(entries, metadata), settings: len(text)}
    made = _make_folder(folder)
    try:
        check_room(sizes)
        with ExitStack() as stack:
            model_file, settings_file = (stack.enter_context(unfinished_file(path, sizes[path])) for path in sizes)
            settings_file.write(text)
            write_stream(model_file, entries, tensors, metadata, progress)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _make_folder(folder: Path) -> bool:
    """Make the folder if it is missing; True if it was."""
    if folder.is_dir():
        return False
    try:
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"The folder {folder} cannot be created ({error.strerror}). A PEFT adapter is a folder of two files. Choose another name, or "
            "create the parent folders."
        ) from error
    return True


def _metadata(view: ExpertView) -> dict[str, str]:
    """The format that other tools expect, and our own entries, so that the expert is recognised when it is loaded."""
    metadata = view.metadata
    side = {} if metadata.side is None else {"dcm.expert": metadata.side}
    levels = level_entries(metadata.boundary, metadata.timesteps, metadata.pair)
    return {"format": "pt", "dcm.family": view.family.name, **side, **levels}


def _loading(folder: Path, root: str) -> str:
    if not root:
        return f"Load it with PeftModel.from_pretrained(pipe.transformer, {str(folder)!r})."
    return (
        f'Load it with PeftModel.from_pretrained(torch.nn.ModuleDict({{"transformer": pipe.transformer}}), {str(folder)!r}): PEFT finds '
        "layers by the ends of their names, and the prefix makes these unique."
    )
