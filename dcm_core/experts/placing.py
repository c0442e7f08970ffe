"""Put experts in a base model's place for one call, and know who answered."""

import inspect
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .modules import (
    NONE,
    Activations,
    AddLinear,
    Forward,
    RoutedExpert,
    RoutedSite,
    add_linear,
    find_module,
    inner_module,
)

# (an object's attributes or a module's parameters, the name of one, what it is during the call)
Placement = tuple[dict[str, Any], str, Any]

# Keys of the sites that are in compiled code.
COMPILED: set[str] = set()


class Place(NamedTuple):
    """What was made for a site on one base: valid while `holder`, `base` and `strength` are the same.

    Attributes:
        holder, attribute: what holds the layer's own forward `base`.
        forward, noting: what stands in for that, and what also notes its use.
        key: of the noting one, in COMPILED.
        container: a module around the layer, and the forward with which it calls the layer.
    """

    holder: Any
    attribute: str
    base: Forward
    strength: float
    forward: Forward
    noting: Forward
    key: str
    container: tuple[nn.Module, Forward] | None

    def is_of(self, holder: Any, base: Forward, strength: float) -> bool:
        return self.holder is holder and self.base == base and self.strength == strength


@contextmanager
def in_place(
    root: nn.Module,
    experts: Iterable[tuple[RoutedExpert, float]],
    add: AddLinear = add_linear,
    activations: Activations = NONE,
    watch: bool = False,
    watch_bare: bool = False,
) -> Iterator[None]:
    """For the length of the block the experts answer in the base's place, later ones on top; then everything is as before.

    Names are set for that long: a layer's `forward`, which hides its class's, and that of a block's bare parameter. No tensor of the
    base is touched. The caller sees to it that one base is in one thread at a time.

    Args:
        root: the base model.
        experts: each with its strength.
        activations: see `RoutedSite.forward`.
        watch: layers note that they are called, for `unanswered`.
        watch_bare: bare parameters note that they are read. Not under torch.compile: it would compile the noting in.
    """
    working = list(experts)

    def placements() -> Iterator[Placement]:
        for expert, strength in working:
            # whole, before any is in place
            yield from (
                *_forwards(expert, root, strength, add, activations, watch),
                *_bare_parameters(expert, root, strength, watch_bare),
            )

    with placed(placements()):
        for expert, _ in working:
            expert.called.clear()
        yield


@contextmanager
def placed(placements: Iterable[Placement]) -> Iterator[None]:
    """For the length of the block names mean something else; then they mean what they did, also if one of them fails.

    Each is asked for when those ahead of it are in place.
    """
    before: list[Placement] = []
    try:
        for names, name, value in placements:
            before.append((names, name, names.get(name)))
            names[name] = value
        yield
    finally:
        for names, name, value in reversed(before):
            if value is None:
                names.pop(name, None)
            else:
                names[name] = value


def unanswered(
    root: nn.Module, experts: Collection[RoutedExpert], required: Collection[str], bare: bool
) -> tuple[set[str], set[str]]:
    """The layers and bare parameters that were not used since `in_place` began with `watch`.

    A part of the model may rest: a block that a node skips while others of its list work, or a part that reads an optional input.

    Args:
        required: names of the top-level parts that every call needs.
        bare: bare parameters were watched, too.

    Returns:
        Those that are lost, and those that rest with all of their part.
    """
    expected = {name for expert in experts for name in (*expert.names, *(expert.bare_names if bare else ()))}
    answered = set().union(*(expert.called for expert in experts))
    answered |= {name for expert in experts for name, place in expert.places.items() if place.key in COMPILED}
    working = {_part(root, name) for name in answered}
    lists = {part[0] for part in working if len(part) > 1}
    lost, resting = set(), set()
    for name in expected - answered:
        part = _part(root, name)
        rests = part not in working and (part[0] in lists if len(part) > 1 else part[0] not in required)
        (resting if rests else lost).add(name)
    return lost, resting


def _part(root: nn.Module, name: str) -> tuple[str, ...]:
    """The part of the model that a tensor or layer belongs to: `("blocks", "3")`, `("text_embedding",)`."""
    first, *rest = name.split(".")
    in_list = rest and isinstance(inner_module(root)._modules.get(first), nn.ModuleList)
    return (first, rest[0]) if in_list else (first,)


def _forwards(
    expert: RoutedExpert, root: nn.Module, strength: float, add: AddLinear, activations: Activations, watch: bool
) -> Iterator[Placement]:
    """What every site puts in place.

    Built once and reused: torch.compile recompiles otherwise. For the same reason a site in compiled code keeps its noting forward.
    """
    for name, site in zip(expert.names, expert.sites, strict=True):
        holder, attribute = _innermost(find_module(root, name))
        base = getattr(holder, attribute)
        place = expert.places.get(name)
        if place is None or not place.is_of(holder, base, strength):
            forward, key = _make_forward(site, base, strength, add, activations), f"{name} {uuid4()}"
            noting = _make_noting(forward, name, expert.called, key)
            place = Place(holder, attribute, base, strength, forward, noting, key, _plain_container(root, name))
            expert.places[name] = place
        yield holder.__dict__, attribute, place.noting if watch or place.key in COMPILED else place.forward
        if place.container is not None and "forward" not in place.container[0].__dict__:
            yield place.container[0].__dict__, "forward", place.container[1]


def _innermost(module: nn.Module) -> tuple[Any, str]:
    """The object and attribute that hold a layer's own forward.

    Another object may stand before the layer and call its `original_forward`, as the host's bypass LoRAs do. What it adds is added
    to the expert's output then, as it is to the base's.
    """
    holder, attribute = module, "forward"
    # not hasattr: what a module lacks takes it long to find out
    while "original_forward" in getattr(outer := getattr(getattr(holder, attribute), "__self__", None), "__dict__", ()):
        holder, attribute = outer, "original_forward"
    return holder, attribute


def _plain_container(root: nn.Module, name: str) -> tuple[nn.Module, Forward] | None:
    """The nn.Sequential around a layer and its plain forward, where its class has another one: that may read the layer's weight itself."""
    parent = find_module(root, name.rpartition(".")[0]) if "." in name else root
    special = isinstance(parent, nn.Sequential) and type(parent).forward is not nn.Sequential.forward
    if not special or len(inspect.signature(type(parent).forward).parameters) != 2:
        return None
    return parent, MethodType(nn.Sequential.forward, parent)


def _make_forward(
    site: RoutedSite, base: Forward, strength: float, add: AddLinear, activations: Activations
) -> Forward:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return site(x, base, strength, add, *args, activations=activations, **kwargs)

    return forward


@torch.compiler.assume_constant_result
def note_compiled(key: str) -> bool:
    """Runs while torch.compile makes code of a call of it, and not when that code runs."""
    COMPILED.add(key)
    return True


def _make_noting(forward: Forward, name: str, called: set[str], key: str) -> Forward:
    """The forward, noting its use: each call of it, or once that it is in compiled code."""

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            # by text: torch.compile gives the code that it made for one text to no other
            note_compiled(key)
        else:
            called.add(name)
        return forward(*args, **kwargs)

    return noting


def _bare_parameters(expert: RoutedExpert, root: nn.Module, strength: float, watch: bool) -> Iterator[Placement]:
    for full_name, (module, name, value) in zip(expert.bare_names, expert.bare_values(root, strength), strict=True):
        # not an attribute that hides the parameter: torch.compile would not see it
        yield module._parameters, name, _watched(value, full_name, expert.called) if watch else value


class Watched(Tensor):
    """A tensor that notes its use and is an ordinary one to whatever uses it.

    Attributes:
        plain: the ordinary tensor.
        key, called: what is noted, and where.
    """

    plain: Tensor
    key: str
    called: set[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(Watched, _use, (args, kwargs or {}))
        return function(*args, **kwargs)


def _use(tensor: Watched) -> Tensor:
    tensor.called.add(tensor.key)
    return tensor.plain


def _watched(value: Tensor, key: str, called: set[str]) -> Watched:
    watched = value.as_subclass(Watched)
    watched.plain, watched.key, watched.called = value, key, called
    return watched
