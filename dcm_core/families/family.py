"""What the code needs to know about a model family."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..schedule import Preset
from .keymap import KeyMap, Rule


@dataclass(frozen=True)
class Family:
    """A family's key table, and what is known about its released experts.

    Attributes:
        DIFFUSERS_TO_NATIVE: the key table. "Native" is the naming of ComfyUI's own model class.
        lora_targets: regex of the diffusers modules with a detail LoRA in the release.
        detail_modules: diffusers modules that the detail expert has its own copy of, stored as `<name>_lora`.
        lora_scale: alpha / rank of the release, whose files store no alpha.
        native_marks: native keys that only this family has.
        text_module: native module that takes the text embeddings.
        convolutions: native modules that are neither linear layers nor norms.
        clip_type: the text encoder's type in the host's CLIPLoader.
        block_lists: native module lists of transformer blocks.
        feature_blocks: the list whose outputs the discriminator sees.
        head: native module of the output norm and projection.
        feature_weight: weight of the feature matching loss in the release's training.
        fps: frames per second of its videos.
        writes_in_place: whether the host's blocks overwrite tensors that a backward pass needs.
        text_extras: (entry of a conditioning, argument of the transformer) in addition to the text embedding.
        pair_boundary: whether the models take an image -> sigma where the second of two full models takes over.
        pair_timesteps: title -> timesteps, largest first, for two full models with few-step LoRAs.
        ALIAS_TO_NATIVE: names in the original code or in other ComfyUI versions that differ from the native ones. Files use them.
    """

    name: str
    title: str
    preset: Preset
    DIFFUSERS_TO_NATIVE: tuple[Rule, ...]
    lora_targets: str
    detail_modules: tuple[str, ...]
    native_marks: tuple[str, ...]
    text_module: str
    convolutions: tuple[str, ...]
    clip_type: str
    block_lists: tuple[str, ...]
    feature_blocks: str
    head: str
    feature_weight: float
    fps: int
    writes_in_place: bool = False
    text_extras: tuple[tuple[str, str], ...] = ()
    lora_scale: float = 2.0
    pair_boundary: Mapping[bool, float] = field(default_factory=dict, hash=False)
    pair_timesteps: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    ALIAS_TO_NATIVE: tuple[Rule, ...] = ()

    @cached_property
    def key_map(self) -> KeyMap:
        return KeyMap(self.DIFFUSERS_TO_NATIVE)

    @cached_property
    def native_map(self) -> KeyMap:
        """Every native module under its own name."""
        rules = self.DIFFUSERS_TO_NATIVE
        return KeyMap(
            [
                Rule(rule.target, rule.target, rule.target_params or rule.params, optional=rule.optional)
                for rule in rules
            ]
        )

    @cached_property
    def alias_map(self) -> KeyMap:
        return KeyMap(self.ALIAS_TO_NATIVE)

    @cached_property
    def lora_target_pattern(self) -> re.Pattern[str]:
        return re.compile(self.lora_targets)

    def is_native(self, keys: Iterable[str]) -> bool:
        """True if the (native, unprefixed) keys are a model of this family."""
        return set(self.native_marks) <= set(keys)

    def detail_source(self, key: str) -> str | None:
        """The base key of a detail copy: `proj_out_lora.weight` -> `proj_out.weight`; None for any other key."""
        for module in self.detail_modules:
            if key.startswith(f"{module}_lora."):
                return module + key[len(module) + len("_lora") :]
        return None
