"""What an expert does to the layers of diffusers' models, in a form that LoRA formats can express."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..families import Family
from ..families.keymap import unfuse
from .expert import LowRank
from .sources import at_scale, source_updates
from .updates import Update


@dataclass
class Layer:
    """What an expert does to one layer of diffusers' model.

    Attributes:
        pair: a low-rank update of its weight.
        bias: added to its output, in addition to the low-rank update.
        replaced: parameter -> the tensor that replaces it; all parameters or none.
    """

    name: str
    pair: LowRank | None = None
    bias: Tensor | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)


def layers_of(module: str, updates: Sequence[Update], family: Family) -> tuple[list[Layer], list[str]]:
    """The diffusers layers behind a native module, and the diffusers names of tensors whose change has no such form.

    Args:
        updates: the module's, from `ExpertView.updates`.
    """
    linear = _is_linear(module, family)
    pairs = [pair for update in updates if linear and update.name == f"{module}.weight" for pair in update.low_rank]
    layers = {
        # at scale 0 a bias cannot be divided by the scale
        piece.source: Layer(piece.source, pair if pair.scale else at_scale(pair, 1.0))
        for piece, pair in source_updates(module, pairs, family)
    }
    left_out: list[str] = []
    replaced: dict[str, Tensor] = {}
    for update in updates:
        if update.replaced is not None:
            replaced[update.name] = update.replaced
        elif update.name == f"{module}.bias" and not update.low_rank and pairs:
            left_out += _add_bias(layers, update, pairs[0].down.shape[1], family)
        elif update.diff is not None or not (linear and update.name == f"{module}.weight"):
            left_out += _names(update.name, family)
    whole, loose = _replaced_layers(replaced, family)
    left_out += loose
    for layer in whole:
        needed = {param for param in ("weight", "bias") if family.key_map.find(f"{layer.name}.{param}")}
        if layer.name in layers or layer.replaced.keys() != needed:
            left_out += [f"{layer.name}.{param}" for param in layer.replaced]
        else:
            layers[layer.name] = layer
    return list(layers.values()), left_out


def _is_linear(module: str, family: Family) -> bool:
    """Whether other tools can put a LoRA of two matrices on it. They cannot on a norm or a convolution."""
    pieces = family.key_map.sources_of(module)
    last = {piece.source.rpartition(".")[2] for piece in pieces}
    return bool(pieces) and module not in family.convolutions and not any(name.startswith("norm") for name in last)


def _names(name: str, family: Family) -> list[str]:
    """What diffusers calls a native tensor."""
    return [piece.source for piece in family.key_map.sources_of_tensor(name)] or [name]


def _add_bias(layers: Mapping[str, Layer], update: Update, width: int, family: Family) -> Iterator[str]:
    """Give each layer with a low-rank update its rows of the bias difference. Returns the names of other layers that have some."""
    pieces = family.key_map.sources_of_tensor(update.name)
    end = update.start + len(update.diff)
    for piece in pieces:
        rows = piece.rows(width, end)
        start, stop = max(rows.start, update.start), min(rows.stop, end)
        part = update.diff[max(0, start - update.start) : max(0, stop - update.start)]
        layer = layers.get(piece.source.removesuffix(".bias"))
        if layer is not None and len(part) == len(layer.pair.up):
            part = piece.in_native_order(part)
            layer.bias = part if layer.bias is None else layer.bias + part
        elif bool(part.any()):
            yield piece.source


def _replaced_layers(replaced: Mapping[str, Tensor], family: Family) -> tuple[list[Layer], list[str]]:
    """The replaced layers by diffusers name, and the names of tensors outside of layers or of parts of a fused bias alone."""
    layers: dict[str, Layer] = {}
    loose: list[str] = []
    weights = [tensor for name, tensor in replaced.items() if name.endswith(".weight") and tensor.ndim > 1]
    width = weights[0].shape[1] if weights else 0
    for name, tensor in replaced.items():
        pieces = family.key_map.sources_of_tensor(name)
        if (
            not pieces
            or pieces[0].source.rpartition(".")[2] not in ("weight", "bias")
            or (len(pieces) > 1 and not width)
        ):
            loose += _names(name, family)
            continue
        for source, part in unfuse(pieces, tensor, width):
            layer, _, param = source.rpartition(".")
            layers.setdefault(layer, Layer(layer)).replaced[param] = part
    return list(layers.values()), loose
