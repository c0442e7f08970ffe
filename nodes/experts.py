"""Attach experts from files."""

import math
from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import ExpertError, check_choice
from ..dcm_core.routing import SIDES
from .host.compat import newer
from .host.experts.attach import attach_experts, attached_experts
from .host.experts.expert_files import expert_names, load_expert, state_of_expert, trained_expert
from .host.folders import fingerprint
from .host.report import report

TrainedExpert = io.Custom("DCM_EXPERT")

STACKED = "detail on top of semantic (as released)"
INDEPENDENT = "independent, each on its side"


def trained_inputs() -> list[io.Input]:
    """Inputs for experts from a training in the same graph, on every node that takes two expert files."""
    return [
        TrainedExpert.Input(
            f"{side}_expert",
            optional=True,
            tooltip=f"A {side} expert directly from its training; overrides {side}_lora.",
        )
        for side in SIDES
    ]


class DCMAttachExperts(io.ComfyNode):
    """MODEL + expert files -> MODEL that routes each step to its expert, in any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
        return io.Schema(
            node_id="DCMAttachExperts",
            display_name="DCM Attach Experts (4-step LoRA)",
            category="DCM/loaders",
            description=(
                "Puts a semantic (high-noise) and a detail (low-noise) expert on a model. Every sampler then runs each step "
                "with the right expert. The base weights are shared and stay unchanged."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Wan or HunyuanVideo model: native, fp8 or GGUF, with or without LoRAs."
                ),
                io.Combo.Input(
                    "semantic_lora",
                    options=expert_names(),
                    default="none",
                    tooltip="Expert for layout and motion: a file in models/loras. With none, the base itself is the semantic expert.",
                ),
                io.Float.Input(
                    "semantic_strength", tooltip="Strength of the semantic expert; 0 leaves it out.", **strength
                ),
                io.Combo.Input(
                    "detail_lora",
                    options=expert_names(),
                    default="none",
                    tooltip="Expert for detail: a file in models/loras. With none, no detail expert is used.",
                ),
                io.Float.Input(
                    "detail_strength", tooltip="Strength of the detail expert; 0 leaves it out.", **strength
                ),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Sigma below which the detail expert works. 0 uses the boundary in the expert file, else the family's "
                    "default (Wan 2.1: 0.979, HunyuanVideo: 0.982).",
                ),
                io.Combo.Input(
                    "experts",
                    options=[STACKED, INDEPENDENT],
                    default=STACKED,
                    optional=True,
                    tooltip="How the two experts combine. Released experts stack: the semantic expert works at all steps, the detail "
                    "expert on top of it at its own steps. Experts trained separately are independent: each works only on its side of "
                    "the boundary.",
                ),
                *trained_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with its experts, for any sampler.")],
            hidden=[io.Hidden.unique_id],
            **newer(
                search_aliases=[
                    "4 step lora",
                    "lightx2v lora",
                    "high noise low noise lora",
                    "wan 2.2 high low lora",
                    "dual expert",
                    "two loras",
                    "apply dcm",
                    "semantic expert",
                    "detail expert",
                ]
            ),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(
        cls, semantic_lora: str | None, detail_lora: str | None, **inputs: Any
    ) -> list[tuple[int, ...]]:
        return [state_of_expert(semantic_lora), state_of_expert(detail_lora)]

    @classmethod
    def execute(
        cls,
        model: Any,
        semantic_lora: str,
        semantic_strength: float,
        detail_lora: str,
        detail_strength: float,
        boundary: float,
        experts: str = STACKED,
        semantic_expert: Any = None,
        detail_expert: Any = None,
    ) -> io.NodeOutput:
        for name, strength in (("semantic_strength", semantic_strength), ("detail_strength", detail_strength)):
            if not math.isfinite(strength):
                raise ExpertError(f"{name} is {strength}; expected a number from -10 to 10.")
        check_choice("experts", experts, (STACKED, INDEPENDENT), ExpertError)
        semantic = trained_expert(semantic_expert, "semantic", model) or load_expert(
            semantic_lora, "semantic", model, strength=semantic_strength
        )
        detail = trained_expert(detail_expert, "detail", model) or load_expert(
            detail_lora, "detail", model, strength=detail_strength
        )
        if semantic is None and detail is None:
            raise ExpertError(
                "semantic_lora and detail_lora are both none. Choose at least one expert file, or remove this node."
            )
        model = attach_experts(
            model,
            semantic,
            detail,
            semantic_strength=semantic_strength,
            detail_strength=detail_strength,
            boundary=boundary,
            stacked=experts == STACKED,
        )
        facts = attached_experts(model)
        lines = []
        for expert, strength in ((semantic, semantic_strength), (detail, detail_strength)):
            if expert is not None:
                lines += [f"{expert}, strength {strength:g}", *(f"  {note}" for note in expert.notes)]
        text = "\n".join([*lines, f"boundary {facts.boundary:g}, {'stacked' if facts.stacked else 'independent'}"])
        return io.NodeOutput(model, ui=report(text, cls.hidden.unique_id))


NODES = [DCMAttachExperts]
