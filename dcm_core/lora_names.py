"""How the world names LoRA tensors: the ending says what a tensor is, the rest which module it belongs to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .families import Family
from .keymap import Piece

Shapes = Mapping[str, Sequence[int]]

Kind = Literal["down", "up", "alpha", "diff", "diff_b", "set_weight", "set_bias", "unsupported"]

# (ending, what it is); the first that matches counts.
ENDINGS: tuple[tuple[str, Kind], ...] = (
    (r"\.lora_A(\.(?P<adapter>[^.]+))?\.weight", "down"),
    (r"\.lora_B(\.(?P<adapter>[^.]+))?\.weight", "up"),
    (r"[._]lora[._](linear_layer\.)?down\.weight", "down"),
    (r"[._]lora[._](linear_layer\.)?up\.weight", "up"),
    (r"\.lora_A", "down"),
    (r"\.lora_B", "up"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.set_weight", "set_weight"),
    (r"\.modules_to_save(\.(?P<adapter>[^.]+))?\.weight", "set_weight"),
    (r"\.modules_to_save(\.(?P<adapter>[^.]+))?\.bias", "set_bias"),
    (r"\.(dora_scale|diff_m|lora_mid\.weight|lora_magnitude_vector.*|hada_.+|lokr_.+|oft_.+|a1\.weight|w_norm|b_norm)", "unsupported"),
)
PATTERNS = tuple((re.compile(rf"(?P<module>.+?){ending}"), kind) for ending, kind in ENDINGS)

# Stripped in this order, each as often as it leads, until the rest is a module of the model.
PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "model.", "unet.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

# What the release calls its detail LoRA.
RELEASE_ADAPTER = "lora1"


@dataclass(frozen=True)
class LoraKey:
    """A LoRA tensor's module (as the file names it), what it is of it, and its PEFT adapter name."""

    module: str
    kind: Kind
    adapter: str | None = None


def split_key(key: str) -> LoraKey | None:
    """Take a LoRA key apart; None if it is none."""
    for pattern, kind in PATTERNS:
        if match := pattern.fullmatch(key):
            return LoraKey(match["module"], kind, match.groupdict().get("adapter"))
    return None


def candidates(module: str) -> list[str]:
    """The names a module may have without the prefixes that tools put before it, the full name first."""
    names = [module]
    for prefix in PREFIXES:
        if names[-1].startswith(prefix):
            names.append(names[-1][len(prefix):])
    return names


def name_of(key: str, family: Family) -> LoraKey | None:
    """The key taken apart; the release's detail copies count as replacements."""
    for name in candidates(key):
        source = family.detail_source(name)
        if source is not None:
            module, _, param = source.rpartition(".")
            return LoraKey(module, "set_bias" if param == "bias" else "set_weight", RELEASE_ADAPTER)
    return split_key(key)


def is_release_part(keys: Iterable[str], family: Family) -> bool:
    """True if a file follows the release's conventions, so that a missing alpha means the release's scale."""
    return any(family.detail_source(key) or ((name := split_key(key)) and name.adapter == RELEASE_ADAPTER) for key in keys)


def flat_name(module: str) -> str | None:
    """The underscored module name of a kohya-style key (`lora_unet_blocks_0_...`), None if it is no such key."""
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            return module[len(prefix):]
    return None


class ModuleNames:
    """Finds the native module behind whatever a file calls it."""

    def __init__(self, family: Family, shapes: Shapes):
        self.key_map = family.key_map
        self.aliases = family.alias_map
        self.tensors = set(shapes)
        self.modules = {name.rpartition(".")[0] for name in shapes}
        self.flat: dict[str, Piece] = {}
        for module in sorted(self.modules | self.tensors):
            pieces = [*self.aliases.sources_of(module), *self.key_map.sources_of(module), Piece(module, module)]
            self.flat |= {piece.source.replace(".", "_"): piece for piece in pieces}

    def find(self, module: str) -> Piece | None:
        """The native place of a module (or of a tensor that is no module's weight), None if the model has none."""
        piece = self._find(module)
        # older hosts call the weight of some norms `scale`
        if piece is not None and f"{piece.target}.weight" not in self.tensors and (scale := f"{piece.target}.scale") in self.tensors:
            return replace(piece, target=scale)
        return piece

    def _find(self, module: str) -> Piece | None:
        flat = flat_name(module)
        if flat is not None:
            return self.flat.get(flat)
        for name in candidates(module):
            if name in self.modules or name in self.tensors:
                return Piece(name, name)
            piece = self.aliases.find_module(name) or self.key_map.find_module(name)
            if piece is not None and (piece.target in self.modules or piece.target in self.tensors):
                return piece
        return None


def count_known(family: Family, keys: Iterable[str]) -> int:
    """How many of the keys a model of the family could have, whatever its depth."""
    rules = (*family.DIFFUSERS_TO_NATIVE, *family.ALIAS_TO_NATIVE)
    known = {re.sub(r"\d+", "{n}", name) for rule in rules for name in (rule.source, rule.target)}
    flat = {name.replace(".", "_") for name in known}
    count = 0
    for key in keys:
        module = name.module if (name := split_key(key)) else key
        bare = flat_name(module)
        if bare is not None:
            count += re.sub(r"\d+", "{n}", bare) in flat
        else:
            count += any(re.sub(r"\d+", "{n}", part) in known for part in candidates(module))
    return count
