"""Put experts in a base model's place for one call, and check that each of their layers was used."""

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

# (an object's attributes or a module's parameters, a name in it, its value during the call)
Placement = tuple[dict[str, Any], str, Any]

# How many places of a site are kept: for the strengths and the experts below it that alternate in a run.
MOST_PLACES = 8

# Keys of the sites inside compiled code.
COMPILED: set[str] = set()


class Place(NamedTuple):
    """What was made for a site on one base. It is valid while `holder`, `base` and `strength` are the same.

    Attributes:
        holder, attribute: the object and attribute with the layer's own forward `base`.
        forward, noting: the forward that replaces it, and the same one recording its use.
        key: the key of `noting` in COMPILED.
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
    part: str = "",
) -> Iterator[None]:
    """Inside the block the experts run in the base's place, later ones on top. Afterwards everything is restored.

    Only attributes are set: the `forward` of a layer, which hides the method of its class, and a block's bare parameters. No
    tensor of the base is changed. The caller makes sure that a base is used by one thread at a time.

    Args:
        root: the base model.
        experts: each expert with its strength.
        activations: see `RoutedSite.forward`.
        watch: record which layers are called, for `unanswered`.
        watch_bare: record which bare parameters are read. Leave it off under torch.compile, which would compile the recording.
        part: the name of a module of the base, to place only what the experts change inside it; empty for everything.
    """
    working, prefix = list(experts), part and f"{part}."

    def placements() -> Iterator[Placement]:
        for expert, strength in working:
            # all of them, before any is in place
            yield from (
                *_forwards(expert, root, strength, add, activations, watch, prefix),
                *_bare_parameters(expert, root, strength, watch_bare, prefix),
            )

    with placed(placements()):
        for expert, _ in working:
            expert.called.clear()
        yield


@contextmanager
def placed(placements: Iterable[Placement]) -> Iterator[None]:
    """Set attributes for the duration of the block, then restore them, even if one of them fails.

    Each placement is computed after the ones ahead of it are in place.
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
    """The layers and bare parameters that were not used inside `in_place` with `watch`.

    A part of the model may be idle: a block that a node skips while others run, or a part for an optional input.

    Args:
        required: names of the top-level parts that every call needs.
        bare: bare parameters were watched too.

    Returns:
        The names that were bypassed, and the names whose part of the model was idle.
    """
    expected = {name for expert in experts for name in (*expert.names, *(expert.bare_names if bare else ()))}
    answered = set().union(*(expert.called for expert in experts))
    answered |= {
        name
        for expert in experts
        for name, places in expert.places.items()
        if any(place.key in COMPILED for place in places)
    }
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
    expert: RoutedExpert,
    root: nn.Module,
    strength: float,
    add: AddLinear,
    activations: Activations,
    watch: bool,
    prefix: str,
) -> Iterator[Placement]:
    """The placements of every site whose name begins with `prefix`.

    They are built once and reused, or torch.compile would recompile. For the same reason a site inside compiled code keeps
    its recording forward.
    """
    for name, site in zip(expert.names, expert.sites, strict=True):
        if not name.startswith(prefix):
            continue
        holder, attribute = _innermost(find_module(root, name))
        base = getattr(holder, attribute)
        places = expert.places.setdefault(name, [])
        place = next((place for place in places if place.is_of(holder, base, strength)), None)
        if place is None:
            forward, key = _make_forward(site, base, strength, add, activations), f"{name} {uuid4()}"
            noting = _make_noting(forward, name, expert.called, key)
            place = Place(holder, attribute, base, strength, forward, noting, key, _plain_container(root, name))
            expert.places[name] = [*places[1 - MOST_PLACES :], place]
        yield holder.__dict__, attribute, place.noting if watch or place.key in COMPILED else place.forward
        if place.container is not None and "forward" not in place.container[0].__dict__:
            yield place.container[0].__dict__, "forward", place.container[1]


def _innermost(module: nn.Module) -> tuple[Any, str]:
    """The object and attribute with a layer's own forward.

    Another object may wrap the layer and call its `original_forward`, as the host's bypass LoRAs do. What it adds to the
    base's output is then added to the expert's output in the same way.
    """
    holder, attribute = module, "forward"
    # hasattr is slow for attributes that a module does not have
    while "original_forward" in getattr(outer := getattr(getattr(holder, attribute), "__self__", None), "__dict__", ()):
        holder, attribute = outer, "original_forward"
    return holder, attribute


def _plain_container(root: nn.Module, name: str) -> tuple[nn.Module, Forward] | None:
    """The nn.Sequential around a layer and its plain forward, if its class overrides that and may read the layer's weight itself."""
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
    """Runs while torch.compile traces a call of it, and not when the compiled code runs."""
    COMPILED.add(key)
    return True


def _make_noting(forward: Forward, name: str, called: set[str], key: str) -> Forward:
    """The forward, recording its use: every call, or once that it is inside compiled code."""

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            # the key is a string: torch.compile guards on it and does not reuse code for another key
            note_compiled(key)
        else:
            called.add(name)
        return forward(*args, **kwargs)

    return noting


def _bare_parameters(
    expert: RoutedExpert, root: nn.Module, strength: float, watch: bool, prefix: str
) -> Iterator[Placement]:
    names = [name for name in expert.bare_names if name.startswith(prefix)]
    for full_name, (module, name, value) in zip(names, expert.bare_values(root, strength, prefix), strict=True):
        # an attribute that hides the parameter would not work: torch.compile does not see it
        yield module._parameters, name, _watched(value, full_name, expert.called) if watch else value


class Watched(Tensor):
    """A tensor that records its use, and acts as an ordinary tensor.

    Attributes:
        plain: the ordinary tensor.
        key, called: what is recorded, and where.
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
