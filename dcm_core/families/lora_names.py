"""How the world names LoRA tensors: the ending says what a tensor is, the rest which module it belongs to."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from . import Family
from .keymap import Piece

Shapes = Mapping[str, Sequence[int]]

Kind = Literal[
    "down",
    "mid",
    "up",
    "up_bias",
    "alpha",
    "reshape",
    "diff",
    "diff_b",
    "diff_m",
    "set_weight",
    "set_bias",
    "unroutable",
]
# What makes one low-rank update.
LOW_RANK: tuple[Kind, ...] = ("down", "mid", "up", "up_bias", "alpha", "reshape")

ADAPTER = r"(\.(?P<adapter>[^.]+))?"
# (ending, what it is); the first that matches counts.
ENDINGS: tuple[tuple[str, Kind], ...] = (
    (rf"\.lora_A{ADAPTER}\.weight", "down"),
    (rf"\.lora_B{ADAPTER}\.weight", "up"),
    (rf"\.lora_B{ADAPTER}\.bias", "up_bias"),
    (r"[._]lora[._](linear_layer\.)?down\.weight", "down"),
    (r"[._]lora[._](linear_layer\.)?up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_A", "down"),
    (r"\.lora_B", "up"),
    (r"\.alpha", "alpha"),
    (r"\.reshape_weight", "reshape"),
    (r"\.(diff|w_norm)", "diff"),
    (r"\.(diff_b|b_norm)", "diff_b"),
    (r"\.diff_m", "diff_m"),
    (r"\.set_weight", "set_weight"),
    (rf"\.modules_to_save{ADAPTER}\.weight", "set_weight"),
    (rf"\.modules_to_save{ADAPTER}\.bias", "set_bias"),
)
# (ending, how people call it) of what is not added to a layer's output, or needs the base's weights to be computed.
UNROUTABLE: tuple[tuple[str, str], ...] = (
    (r"\.(dora_scale|lora_magnitude_vector.*)", "DoRA"),
    (r"\.hada_.+", "LoHa"),
    (r"\.lokr_.+", "LoKr"),
    (r"\.(oft_.+|rescale)", "OFT or BOFT"),
    (r"\.boft_.+", "BOFT"),
    (r"\.[ab][12]\.weight", "GLoRA"),
    (r"\.(on_input|ia3_l.*)", "IA3"),
    (r"\.vera_lambda_.+", "VeRA"),
    (r"\.(lora_E|ranknum).*", "AdaLoRA"),
)
# Plain names after PEFT's own prefix: its `modules_to_save`, and the base's biases that it trained (`bias`).
PEFT_PREFIX = "base_model.model."
SAVED: tuple[tuple[str, Kind], ...] = ((r"\.weight", "set_weight"), (r"(\.base_layer)?\.bias", "set_bias"))
PATTERNS = tuple(
    (re.compile(rf"(?P<module>{start}.+?){ending}"), kind, method)
    for start, ending, kind, method in (
        *(("", ending, kind, "") for ending, kind in ENDINGS),
        *(("", ending, "unroutable", method) for ending, method in UNROUTABLE),
        *((re.escape(PEFT_PREFIX), ending, kind, "") for ending, kind in SAVED),
    )
)
# No tensor has a longer name; matching a crafted one would take long.
LONGEST_KEY = 500

# Stripped as long as one leads and the rest is no module of the model.
PREFIXES = (
    PEFT_PREFIX,
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "dit.",
    "module.",
    "model.",
    "unet.",
)
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
# What wrappers of PyTorch write into the middle of a name: torch.compile, FSDP, activation checkpointing.
COMPILED = "_orig_mod"
WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?((lora|lycoris)_(prior_)?te\d?_|(text_encoders?|te|cond_stage_model|conditioner|text_model)(_?\d)?\."
    r"|(clip_[lgh]|u?m?t5xxl|llama|llava)[\w-]*\.)"
)

# What the release calls its detail LoRA.
RELEASE_ADAPTER = "lora1"


@dataclass(frozen=True)
class LoraKey:
    """A LoRA tensor's name taken apart.

    Attributes:
        module: what it belongs to, as the file names it.
        kind: what it is of its module.
        adapter: its PEFT adapter name.
        method: what people call it, if it is unroutable.
    """

    module: str
    kind: Kind
    adapter: str | None = None
    method: str = ""


@lru_cache(maxsize=1 << 16)
def split_key(key: str) -> LoraKey | None:
    """Take a LoRA key apart; None if it is none."""
    if len(key) <= LONGEST_KEY:
        for pattern, kind, method in PATTERNS:
            if match := pattern.fullmatch(key):
                return LoraKey(match["module"], kind, match.groupdict().get("adapter"), method)
    return None


def unwrapped(name: str) -> str:
    """The name of a module or tensor without what wrappers of PyTorch write into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def candidates(module: str) -> Iterator[str]:
    """The names a module may have without what tools put before it, the full name first."""
    module = unwrapped(module)
    while module:
        yield module
        module = next((module[len(prefix) :] for prefix in PREFIXES if module.startswith(prefix)), "")


def flat_candidates(module: str) -> Iterator[str]:
    """The same for a kohya-style name (`lora_unet_blocks_0_...`): without its prefix, every dot as `_`; none for others."""
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            # some tools leave dots, or write `_` twice
            flat = module[len(prefix) :].replace(".", "_").strip("_")
            while flat:
                yield flat
                flat = next((flat[len(p) :] for other in PREFIXES if flat.startswith(p := other.replace(".", "_"))), "")


def is_text_encoder(module: str) -> bool:
    """True for a module of a text encoder, which no transformer has."""
    return TEXT_ENCODER.match(module) is not None


def name_of(key: str, family: Family) -> LoraKey | None:
    """The key taken apart; the release's detail copies count as replacements."""
    for name in candidates(key) if len(key) <= LONGEST_KEY else ():
        source = family.detail_source(name)
        if source is not None:
            module, _, param = source.rpartition(".")
            return LoraKey(module, "set_bias" if param == "bias" else "set_weight", RELEASE_ADAPTER)
    return split_key(key)


def is_release_part(keys: Iterable[str], family: Family) -> bool:
    """True if a file follows the release's conventions, so that a missing alpha means the release's scale."""
    return any(
        family.detail_source(key) or ((name := split_key(key)) and name.adapter == RELEASE_ADAPTER) for key in keys
    )


def places(module: str, family: Family) -> Iterator[Piece]:
    """Where a module of that name may be, in a model of any depth, the likeliest place first."""
    maps = (family.native_map, family.alias_map, family.key_map)
    for name in candidates(module):
        yield from filter(None, (key_map.find_module(name) for key_map in maps))
    for name in flat_candidates(module):
        yield from filter(None, (key_map.find_flat(name) for key_map in maps))


class ModuleNames:
    """Finds the native module behind whatever a file calls it."""

    def __init__(self, family: Family, shapes: Shapes):
        self.family = family
        self.shapes = shapes
        # also of layers that no table has
        self.flat = {module.replace(".", "_"): module for name in shapes for module in (name.rpartition(".")[0], name)}

    def find(self, module: str) -> Piece | None:
        """The native place of a module (or of a tensor that is no module's weight), None if the model has none."""
        own = [*candidates(module), *(self.flat.get(name, "") for name in flat_candidates(module))]
        found = (*(Piece(name, name) for name in own), *places(module, self.family))
        piece = next((piece for piece in found if self._has(piece.target)), None)
        # older hosts call the weight of some norms `scale`
        if (
            piece is not None
            and f"{piece.target}.weight" not in self.shapes
            and (scale := f"{piece.target}.scale") in self.shapes
        ):
            return replace(piece, target=scale)
        return piece

    def lacks(self, module: str) -> str:
        """What the module is for, if it is one that only some models of the family have; "" for any other."""
        return next((piece.optional for piece in places(module, self.family)), "")

    def _has(self, module: str) -> bool:
        return any(
            name in self.shapes
            for name in (module, *(f"{module}.{p}" for p in ("weight", "bias", "scale", "modulation")))
        )


def count_known(family: Family, keys: Iterable[str]) -> int:
    """How many of the keys a model of the family could have, whatever its depth."""
    names = (name.module if (name := split_key(key)) else key for key in keys if len(key) <= LONGEST_KEY)
    return sum(any(places(name, family)) for name in names)
