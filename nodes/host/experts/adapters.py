"""Kinds of LoRA beyond the plain one (LoHa, LoKr, GLoRA, OFT, BOFT, DoRA) as tensors that an expert can have.

The host's adapter classes read and compute them. Each becomes a LoRA where that is exact and smaller, else a full
difference, under its own name in the file. `read_expert` then reads them with the rest of the file.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import comfy.model_management
import comfy.weight_adapter
import torch
from torch import Tensor, nn

from ....dcm_core.errors import ExpertError, counted, name_some
from ....dcm_core.experts.expert import FILE_PREFIX
from ....dcm_core.experts.match import tensor_name
from ....dcm_core.experts.reader import check_values, find_places
from ....dcm_core.families.keymap import Piece
from ....dcm_core.families.lora_names import ModuleNames, Shapes, split_key
from ....dcm_core.text import one_line
from ..compat import is_oom, key_patches
from ..progress import byte_progress
from .attach import compute_dtype, module_shapes, require_family

TITLES = {"lora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
# What the host's classes raise for tensors that do not fit together.
MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NameError, ArithmeticError)
# Tensors of a layer's size, in float32, that the host's classes have at once.
COPIES = 6

# Native tensor name -> the model's own value in float32.
WeightOf = Callable[[str], Tensor]


@dataclass(frozen=True)
class Adapter:
    """One of a file's adapters.

    Attributes:
        module: its name in the file.
        keys: its tensors in the file.
        host, empty: the host's adapter, and the same without values.
        piece, name: its module in the model, and the native name of the weight.
        shape: shape of the weight, or of the rows that belong to the module.
        needs_base: what it adds to a weight depends on the weight.
        low_rank: an equal LoRA without values, if that is smaller than a difference.
    """

    module: str
    keys: frozenset[str]
    host: Any
    empty: Any
    piece: Piece
    name: str
    shape: tuple[int, ...]
    needs_base: bool
    low_rank: Mapping[str, Tensor] | None

    @property
    def title(self) -> str:
        return "DoRA" if f"{self.module}.dora_scale" in self.keys else TITLES.get(self.host.name, self.host.name)


def is_proportional(keys: Iterable[str]) -> bool:
    """Whether what a file changes is proportional to its strength. OFT and BOFT turn weights instead."""
    return not any(key.endswith(".oft_blocks") for key in keys)


def plain_tensors(
    tensors: Mapping[str, Tensor], model: Any, strength: float = 1.0
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The tensors of a file, with adapters of these kinds as LoRA or as full differences.

    Args:
        strength: where they will be used at. What OFT and BOFT change is not proportional to it.

    Returns:
        The tensors, and notes on what was done.

    Raises:
        ExpertError: adapters that are incomplete, broken or for another model; too little memory. Names the tensors.
    """
    shapes = module_shapes(model)
    names = ModuleNames(require_family(model), shapes)
    modules = {name.module: None for key in tensors if (name := split_key(key)) and name.kind == "computed"}
    adapters = [adapter for module in modules if (adapter := _adapter(module, tensors, names))]
    if not adapters:
        return tensors, ()
    # the host patches a weight with either one of them
    whole = {adapter.name for adapter in adapters if adapter.low_rank is None}
    used = frozenset().union(*(adapter.keys for adapter in adapters))
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    check_values({key: tensor for key, tensor in tensors.items() if key in used})
    _check_places(rest, adapters, whole, names)
    differences = [adapter for adapter in adapters if adapter.name in whole]
    size = sum(prod(shapes[name]) for name in whole) * compute_dtype(model).itemsize
    _check_memory(size, differences, model.offload_device)
    low_rank = [
        _low_rank(adapter.module, {key: tensors[key] for key in adapter.keys})
        for adapter in adapters
        if adapter.name not in whole
    ]
    made = [*low_rank, _differences(differences, model, strength or 1.0)]
    return {key: tensor for part in (rest, *made) for key, tensor in part.items()}, _notes(adapters, whole, size)


def _adapter(module: str, tensors: Mapping[str, Tensor], names: ModuleNames) -> Adapter | None:
    """The adapter of a module; None if the model has no such module, or the host no such adapter."""
    piece = names.find(module)
    if piece is None or (name := tensor_name(piece, "diff", names.shapes)) not in names.shapes:
        return None
    whole = tuple(names.shapes[name])
    shape = whole
    if piece.part is not None:
        shape = (len(range(*piece.rows(whole[1]).indices(whole[0]))), *whole[1:])
    alpha, scale = tensors.get(f"{module}.alpha"), tensors.get(f"{module}.dora_scale")
    _check_small(module, alpha, scale, shape)
    keys = {f"{module}.{end}" for end in ("alpha", "dora_scale")} & tensors.keys()
    try:
        number = None if alpha is None else alpha.item()
        found = [cls.load(module, tensors, number, scale, keys) for cls in comfy.weight_adapter.adapters]
    except KeyError as error:
        raise ExpertError(
            f"{one_line(error.args[0])} is missing from its layer. Save or download the file again."
        ) from error
    hosts = [host for host in found if host is not None]
    if len(hosts) > 1:
        titles = " and ".join(host.name for host in hosts)
        raise ExpertError(f"{module} is {titles} at once, of which ComfyUI would use one. Merge them first.")
    if not hosts:
        return None
    needs_base = scale is not None or hosts[0].name not in ("loha", "lokr")
    without_values = {key: tensors[key].to("meta") for key in keys}
    empty = type(hosts[0]).load(module, without_values, number, without_values.get(f"{module}.dora_scale"), set())
    low_rank = None
    if not needs_base and len(shape) == 2:
        found = _low_rank(module, without_values)
        low_rank = found if found and sum(tensor.numel() for tensor in found.values()) < prod(shape) else None
    return Adapter(module, frozenset(keys), hosts[0], empty, piece, name, shape, needs_base, low_rank)


def _check_small(module: str, alpha: Tensor | None, scale: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check alpha and the DoRA scale, which the host would broadcast to whatever shape comes out."""
    if alpha is not None and alpha.numel() != 1:
        raise ExpertError(
            f"{module}.alpha has shape {tuple(alpha.shape)}; expected a single number. Save the expert again."
        )
    ones = (1,) * (len(shape) - 2)
    fitting = [(shape[0], 1, *ones), (1, *shape[1:2], *ones)] if len(shape) > 1 else [shape]
    if scale is not None and tuple(scale.shape) not in fitting:
        raise ExpertError(
            f"{module}.dora_scale has shape {tuple(scale.shape)}; expected {' or '.join(map(str, fitting))}. "
            "Use an expert made for a model of this size."
        )


def _low_rank(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoHa and LoKr of matrices as LoRA; empty if there is no such form.

    (A B) * (C D) is the product of the row-wise products of A and C and the column-wise products of B and D. And
    kron(W, A B) = kron(W, A) kron(1, B) = kron(1, A) kron(W, B).
    """
    held = {key.removeprefix(f"{module}."): tensor for key, tensor in tensors.items() if key.startswith(f"{module}.")}
    held = {name: tensor if name == "alpha" else tensor.float() for name, tensor in held.items()}
    try:
        match held:
            case {"hada_t1": _} | {"lokr_t2": _} | {"lokr_w2": _}:
                return {}
            case {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}:
                up = (a[:, :, None] * c[:, None, :]).flatten(1)
                down = (b[:, None, :] * d[None, :, :]).flatten(0, 1)
                rank = b.shape[0]
            case {"lokr_w2_a": a, "lokr_w2_b": b}:
                w = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
                outer, inner = w.shape
                one = torch.eye(min(outer, inner), device=w.device)
                up, down = (
                    (torch.kron(one, a), torch.kron(w, b)) if outer < inner else (torch.kron(w, a), torch.kron(one, b))
                )
                rank = b.shape[0]
            case _:
                return {}
    except MISFITS as error:
        raise ExpertError(
            f"The tensors of {module} do not fit together ({one_line(error)}). Save or download the file again."
        ) from error
    # the host's alpha is over the adapter's own rank
    alpha = held.get("alpha", torch.tensor(float(rank)))
    return {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": alpha.float().reshape(()) * down.shape[0] / rank,
    }


def _check_places(rest: Mapping[str, Tensor], adapters: Sequence[Adapter], whole: set[str], names: ModuleNames) -> None:
    """Refuse whatever does not fit the model, and whatever else is in the file, before the work."""
    planned: dict[str, Sequence[int]] = {}
    for adapter in adapters:
        if adapter.name in whole:
            planned[f"{adapter.module}.diff"] = adapter.shape
            # rotations look at values
            if "oft" not in adapter.empty.name:
                _applied(adapter, adapter.empty, torch.empty(adapter.shape, device="meta"), 1.0)
        else:
            planned |= {key: tuple(tensor.shape) for key, tensor in adapter.low_rank.items()}
    if twice := planned.keys() & rest.keys():
        raise ExpertError(f"{name_some(twice)} and an adapter are for the same layer; expected one. Merge them first.")
    find_places({key: tuple(tensor.shape) for key, tensor in rest.items()} | planned, names.family, names.shapes)


def _differences(adapters: Sequence[Adapter], model: Any, strength: float) -> dict[str, Tensor]:
    """The adapters as full differences in the dtype that the model computes in."""
    progress, device, dtype = byte_progress(None), model.load_device, compute_dtype(model)
    largest = max((prod(adapter.shape) for adapter in adapters), default=0)
    comfy.model_management.free_memory(COPIES * largest * torch.float32.itemsize, device)
    weight_of = _own_weights(model, module_shapes(model))
    found = {}
    for done, adapter in enumerate(adapters):
        progress(done, len(adapters))
        difference = _difference(adapter, weight_of, strength, device)
        found[f"{adapter.module}.diff"] = difference.to(device="cpu", dtype=dtype)
    return found


def _difference(adapter: Adapter, weight_of: WeightOf, strength: float, device: torch.device) -> Tensor:
    """What the adapter adds to the weight at a strength, over the strength; in the order of the file's rows."""
    start = adapter.piece.rows(adapter.shape[-1]).start if adapter.piece.part is not None else 0
    weight = torch.zeros(adapter.shape, device=device)
    if adapter.needs_base:
        rows = weight_of(adapter.name)[start : start + adapter.shape[0]]
        # halves that change places do so in both directions
        weight = adapter.piece.in_native_order(rows).to(device)
    return (_applied(adapter, adapter.host, weight.clone(), strength) - weight) / strength


def _applied(adapter: Adapter, host: Any, weight: Tensor, strength: float) -> Tensor:
    """The weight with the host's adapter in it. It may be computed in place."""
    with _errors_raised(adapter):
        result = host.calculate_weight(
            weight, adapter.name, strength, 1.0, None, lambda change: change, torch.float32, None
        )
        if result is None or tuple(result.shape) != adapter.shape:
            raise ValueError("the result has another shape")
    return result


@contextmanager
def _errors_raised(adapter: Adapter) -> Iterator[None]:
    """Turn what the host's adapters raise into an ExpertError. Most of it they only log, leaving the weight unchanged."""
    thread = threading.get_ident()

    def stop(record: logging.LogRecord) -> bool:
        if record.thread == thread and record.levelno >= logging.ERROR:
            raise ValueError(record.getMessage())
        return True

    root = logging.root
    root.addFilter(stop)
    try:
        yield
    except MISFITS as error:
        if is_oom(error):
            # `stop` hides the host's own error
            raise (error.__context__ or error) from None
        raise ExpertError(
            f"ComfyUI cannot apply the {adapter.title} of {adapter.module} to {adapter.name} {adapter.shape} ({one_line(error)}). "
            "The file is incomplete, or made for a model of another size."
        ) from error
    finally:
        root.removeFilter(stop)


def _own_weights(model: Any, shapes: Shapes) -> WeightOf:
    """The MODEL's own weights, dequantised, without the patches of LoRAs."""
    stored = key_patches(model)

    def weight_of(name: str) -> Tensor:
        weight, convert = stored[FILE_PREFIX + name][0]
        plain = convert(weight.detach()).to(torch.float32)
        if type(plain) not in (Tensor, nn.Parameter) or tuple(plain.shape) != tuple(shapes[name]):
            raise ExpertError(
                f"This kind of expert is computed from the model's weights, but {name} is stored as {type(weight.data).__name__}. "
                "Load the model in float16, bfloat16 or fp8."
            )
        return plain

    return weight_of


def _check_memory(size: int, differences: Sequence[Adapter], device: torch.device) -> None:
    """Refuse differences that do not fit. They are in memory twice while the expert is attached."""
    free = comfy.model_management.get_free_memory(device)
    if 2 * size > free:
        titles = " and ".join(sorted({adapter.title for adapter in differences}))
        raise ExpertError(
            f"{titles} on {counted(len(differences), 'layer')} needs {2 * size / 1e9:.3g} GB of memory as full differences, but "
            f"{device} has {free / 1e9:.3g} GB free. Convert the file to plain LoRA, or load it with LoraLoaderModelOnly for all steps."
        )


def _notes(adapters: Sequence[Adapter], whole: set[str], size: int) -> tuple[str, ...]:
    notes = []
    for title in sorted({adapter.title for adapter in adapters}):
        mine = [adapter for adapter in adapters if adapter.title == title]
        ranks = sorted(
            {
                adapter.low_rank[f"{adapter.module}.lora_down.weight"].shape[0]
                for adapter in mine
                if adapter.name not in whole
            }
        )
        if ranks:
            count = sum(adapter.name not in whole for adapter in mine)
            rank = f"{ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
            notes.append(f"{title}: {counted(count, 'layer')} as LoRA of rank {rank}")
        if full := [adapter for adapter in mine if adapter.name in whole]:
            based = ", computed from the model's own weights without LoRAs" if full[0].needs_base else ""
            notes.append(f"{title}: {counted(len(full), 'layer')} as full differences{based}")
    if size:
        notes.append(f"full differences take {size / 1e9:.3g} GB")
    unused = [
        key for adapter in adapters if adapter.host.name == "oft" for key in adapter.keys if key.endswith(".rescale")
    ]
    if unused:
        notes.append(f"left out {counted(len(unused), 'tensor')}: rescale of OFT, which ComfyUI does not use")
    return tuple(notes)
