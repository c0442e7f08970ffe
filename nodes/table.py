"""An expert table: any number of experts, models and cfgs, each for a part of the run."""

import math
from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import DCMError
from ..dcm_core.table import UNITS, Span, parse_strengths
from ..dcm_core.text import given, has_hidden
from .experts import TrainedExpert
from .host.compat import advanced, newer
from .host.experts.expert_files import expert_names, state_of_expert
from .host.experts.route import attached_experts
from .host.experts.table import ChosenExpert, ChosenRow, attach_table, with_row
from .host.folders import LORAS, NONE, fingerprint, path_of
from .host.report import report

Rows = io.Custom("DCM_ROWS")

# Longer names do not fit on the node.
LONGEST_NAME = 40


class DCMExpert(io.ComfyNode):
    """Rows and one more: a LoRA, a model or a cfg for a part of the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        bound = {"min": 0.0, "max": 1000.0, "step": 0.001, "round": False}
        return io.Schema(
            node_id="DCMExpert",
            display_name="DCM Expert (LoRA per step)",
            category="DCM/loaders",
            description=(
                "One row of an expert table: which LoRA, model or cfg works in which steps. Chain several of these nodes, then "
                "connect the last one to DCM Attach Table. Where rows overlap, all their LoRAs work."
            ),
            inputs=[
                io.String.Input(
                    "name",
                    default="high",
                    tooltip="Name of the row, shown in the plan. Nodes with the same name and interval make one row.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default="steps",
                    tooltip="Unit of start and end. With steps, they are the first and the last step of the row, counted from 1. With "
                    "sigma, they are noise levels from 1 down to 0. With percent, they are parts of the run from 0 to 1, as in "
                    "ComfyUI's own nodes.",
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    tooltip="Where the row begins: its first step, its highest noise level, or its first part of the run.",
                    **bound,
                ),
                io.Float.Input(
                    "end",
                    default=2.0,
                    tooltip="Where the row ends: its last step, its lowest noise level, or the end of its part of the run.",
                    **bound,
                ),
                io.Combo.Input(
                    "lora",
                    options=expert_names(),
                    default=NONE,
                    tooltip="A LoRA or expert file in models/loras. With none, the row changes only the model or the cfg.",
                ),
                io.String.Input(
                    "strength",
                    default="1",
                    tooltip="Strength of the LoRA. For one strength per step of the row, write a list such as 1, 1, 0.5. The last one is "
                    "kept for further steps. 0 leaves the LoRA out.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="cfg in these steps. Values other than 1 need a negative prompt. 0 uses the sampler's cfg.",
                    **advanced(io.Float.Input),
                ),
                Rows.Input("rows", optional=True, tooltip="The rows before this one, from another DCM Expert."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A full model for these steps, such as Wan 2.2 low noise. It is loaded when its steps begin.",
                ),
                TrainedExpert.Input(
                    "expert", optional=True, tooltip="An expert directly from its training. Overrides lora."
                ),
            ],
            outputs=[Rows.Output(display_name="rows", tooltip="For the next DCM Expert, or for DCM Attach Table.")],
            **newer(
                search_aliases=[
                    "lora per step",
                    "lora schedule",
                    "lora strength schedule",
                    "lora in some steps",
                    "phased lora",
                    "three samplers",
                    "cfg per step",
                    "4 step lora",
                    "wan 2.2 high low lora",
                ]
            ),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, lora: str | None = None, **inputs: Any) -> tuple[int, ...]:
        return state_of_expert(lora)

    @classmethod
    def execute(
        cls,
        name: str,
        unit: str,
        start: float,
        end: float,
        lora: str,
        strength: str,
        cfg: float,
        rows: Any = None,
        model: Any = None,
        expert: Any = None,
    ) -> io.NodeOutput:
        name = name.strip() if isinstance(name, str) else name
        if not (isinstance(name, str) and 0 < len(name) <= LONGEST_NAME) or has_hidden(name):
            raise DCMError(f"name is {given(name)}; expected 1 to {LONGEST_NAME} visible characters, such as high.")
        if not (math.isfinite(cfg) and 0 <= cfg <= 100):
            raise DCMError(f"cfg is {cfg}; expected a number from 0 to 100. 0 uses the sampler's cfg.")
        strengths = parse_strengths(strength)
        if expert is None and lora != NONE:
            # said on this node, not on the one that reads the file
            path_of(LORAS, lora, "lora")
        chosen = () if expert is None and lora == NONE else (ChosenExpert(strengths, lora, expert),)
        row = ChosenRow(name, Span(unit, start, end), chosen, model, cfg or None)
        return io.NodeOutput(with_row(rows or (), row))


class DCMAttachTable(io.ComfyNode):
    """MODEL + rows -> MODEL whose steps are run by the rows, in any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMAttachTable",
            display_name="DCM Attach Table",
            category="DCM/loaders",
            description=(
                "Puts the rows of DCM Expert nodes on a model. Every sampler then uses, in each step, the LoRAs, the model and the "
                "cfg of its rows. Steps without a row use the plain model. The base weights stay unchanged."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that runs all steps without a model of their own. Experts on it are replaced.",
                ),
                Rows.Input("rows", tooltip="The rows, from the last DCM Expert."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with its rows, for any sampler.")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lora per step", "lora schedule", "expert table", "three samplers", "phased lora"]),
        )

    @classmethod
    def execute(cls, model: Any, rows: Any) -> io.NodeOutput:
        before = attached_experts(model)
        model = attach_table(model, rows)
        lines = [*attached_experts(model).lines]
        if before is not None:
            lines.append("Replaces the experts that were attached to the model before.")
        return io.NodeOutput(model, ui=report("\n".join(lines), cls.hidden.unique_id))


NODES = [DCMExpert, DCMAttachTable]
