"""The names that tools use for LoRA tensors. The suffix tells the kind of tensor, the rest its module."""

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
    "computed",
    "unroutable",
]
# The kinds that make up one low-rank update.
LOW_RANK: tuple[Kind, ...] = ("down", "mid", "up", "up_bias", "alpha", "reshape")

ADAPTER = r"(\.(?P<adapter>[^.]+))?"
# (suffix, kind). The first match counts.
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
# (suffix, common name) of methods that the host's adapter classes compute when an expert is attached.
COMPUTED: tuple[tuple[str, str], ...] = (
    (r"\.dora_scale", "DoRA"),
    (r"\.hada_(w[12]_[ab]|t[12])", "LoHa"),
    (r"\.lokr_(w[12](_[ab])?|t2)", "LoKr"),
    (r"\.(oft_blocks|rescale)", "OFT or BOFT"),
    (r"\.[ab][12]\.weight", "GLoRA"),
)
# The same for methods that nothing here can read: they do not add to a layer's output, or need the base's weights.
UNROUTABLE: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector.*", "PEFT DoRA"),
    (r"\.hada_.+", "PEFT LoHa"),
    (r"\.lokr_.+", "PEFT LoKr"),
    (r"\.oft_.+", "PEFT OFT"),
    (r"\.boft_.+", "PEFT BOFT"),
    (r"\.(on_input|ia3_l.*)", "IA3"),
    (r"\.vera_lambda_.+", "VeRA"),
    (r"\.(lora_E|ranknum).*", "AdaLoRA"),
)
# Plain names after PEFT's own prefix: its `modules_to_save`, and biases of the base that it trained (`bias`).
PEFT_PREFIX = "base_model.model."
SAVED: tuple[tuple[str, Kind], ...] = ((r"\.weight", "set_weight"), (r"(\.base_layer)?\.bias", "set_bias"))
PATTERNS = tuple(
    (re.compile(rf"(?P<module>{start}.+?){ending}"), kind, method)
    for start, ending, kind, method in (
        *(("", ending, kind, "") for ending, kind in ENDINGS),
        *(("", ending, "computed", method) for ending, method in COMPUTED),
        *(("", ending, "unroutable", method) for ending, method in UNROUTABLE),
        *((re.escape(PEFT_PREFIX), ending, kind, "") for ending, kind in SAVED),
    )
)
# No tensor has a longer name, and matching a crafted one would take long.
LONGEST_KEY = 500

# Prefixes, stripped one by one until the rest is a module of the model.
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
# What PyTorch wrappers insert into names: torch.compile, FSDP, activation checkpointing.
COMPILED = "_orig_mod"
WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?((lora|lycoris)_(prior_)?te\d?_|(text_encoders?|te|cond_stage_model|conditioner|text_model)(_?\d)?\."
    r"|(clip_[lgh]|u?m?t5xxl|llama|llava)[\w-]*\.)"
)

# The release's name for its detail LoRA.
RELEASE_ADAPTER = "lora1"


@dataclass(frozen=True)
class LoraKey:
    """The parts of a LoRA tensor's name.

    Attributes:
        module: the module it belongs to, as the file names it.
        kind: which tensor of the module it is.
        adapter: its PEFT adapter name.
        method: common name of its method, if that is not plain LoRA.
    """

    module: str
    kind: Kind
    adapter: str | None = None
    method: str = ""


@lru_cache(maxsize=1 << 16)
def split_key(key: str) -> LoraKey | None:
    """Split a LoRA key into its parts; None for any other key."""
    if len(key) <= LONGEST_KEY:
        for pattern, kind, method in PATTERNS:
            if match := pattern.fullmatch(key):
                return LoraKey(match["module"], kind, match.groupdict().get("adapter"), method)
    return None


def unwrapped(name: str) -> str:
    """The name of a module or tensor without what PyTorch wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def candidates(module: str) -> Iterator[str]:
    """The names a module may have without the prefixes of tools, the full name first."""
    module = unwrapped(module)
    while module:
        yield module
        module = next((module[len(prefix) :] for prefix in PREFIXES if module.startswith(prefix)), "")


def flat_candidates(module: str) -> Iterator[str]:
    """The same for a kohya-style name (`lora_unet_blocks_0_...`): without its prefix, with `_` for every dot. Empty for other names."""
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            # some tools keep the dots, or double the `_`
            flat = module[len(prefix) :].replace(".", "_").strip("_")
            while flat:
                yield flat
                flat = next((flat[len(p) :] for other in PREFIXES if flat.startswith(p := other.replace(".", "_"))), "")


def is_text_encoder(module: str) -> bool:
    """True for a module of a text encoder, which no transformer has."""
    return TEXT_ENCODER.match(module) is not None


def name_of(key: str, family: Family) -> LoraKey | None:
    """Like `split_key`, but the release's detail copies count as replacements."""
    for name in candidates(key) if len(key) <= LONGEST_KEY else ():
        source = family.detail_source(name)
        if source is not None:
            module, _, param = source.rpartition(".")
            return LoraKey(module, "set_bias" if param == "bias" else "set_weight", RELEASE_ADAPTER)
    return split_key(key)


def is_release_part(keys: Iterable[str], family: Family) -> bool:
    """True if a file follows the release's conventions. A missing alpha then means the release's scale."""
    return any(
        family.detail_source(key) or ((name := split_key(key)) and name.adapter == RELEASE_ADAPTER) for key in keys
    )


def places(module: str, family: Family) -> Iterator[Piece]:
    """Where a module of that name may be in a model of any depth, the likeliest place first."""
    maps = (family.native_map, family.alias_map, family.key_map)
    for name in candidates(module):
        yield from filter(None, (key_map.find_module(name) for key_map in maps))
    for name in flat_candidates(module):
        yield from filter(None, (key_map.find_flat(name) for key_map in maps))


class ModuleNames:
    """Finds the native module for the name that a file uses."""

    def __init__(self, family: Family, shapes: Shapes):
        self.family = family
        self.shapes = shapes
        # includes layers that are in no table
        self.flat = {module.replace(".", "_"): module for name in shapes for module in (name.rpartition(".")[0], name)}

    def find(self, module: str) -> Piece | None:
        """The native place of a module or of a bare parameter; None if the model does not have it."""
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
        """What the module is for, if only some models of the family have it; "" for any other."""
        return next((piece.optional for piece in places(module, self.family)), "")

    def _has(self, module: str) -> bool:
        return any(
            name in self.shapes
            for name in (module, *(f"{module}.{p}" for p in ("weight", "bias", "scale", "modulation")))
        )


def count_known(family: Family, keys: Iterable[str]) -> int:
    """How many of the keys a model of the family could have, at any depth."""
    names = (name.module if (name := split_key(key)) else key for key in keys if len(key) <= LONGEST_KEY)
    return sum(any(places(name, family)) for name in names)
