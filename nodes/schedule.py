"""Noise levels for any sampler node."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.routing import split_sigmas
from .host.compat import newer
from .host.sampling import AUTO, GENERIC, PRESETS, choose_sigmas


class DCMScheduler(io.ComfyNode):
    """A schedule by name -> SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMScheduler",
            display_name="DCM Scheduler",
            category="DCM/sampling",
            description="The noise levels DCM experts are made for.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *PRESETS, GENERIC],
                    default=AUTO,
                    tooltip="auto: what the model's experts were made for. generic: `steps` levels of the training grid.",
                ),
                io.Int.Input("steps", default=6, min=1, max=50, tooltip="Number of steps of the generic schedule."),
                io.Float.Input(
                    "shift", default=17.0, min=0.01, max=100.0, step=0.1, tooltip="Flow shift of the generic schedule. DCM uses 17."
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="The share of the schedule's steps to keep, from its end."
                ),
                io.Model.Input("model", optional=True, tooltip="Needed by auto: it reads the schedule of the model's experts."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="Falling noise levels, the last 0.")],
            **newer(search_aliases=["dcm sigmas", "few step schedule"]),
        )

    @classmethod
    def execute(cls, preset: str, steps: int, shift: float, denoise: float, model: Any = None) -> io.NodeOutput:
        return io.NodeOutput(choose_sigmas(preset, steps, shift, denoise, model))


class DCMSplitSigmas(io.ComfyNode):
    """SIGMAS at a boundary -> the high-noise and the low-noise stretch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSplitSigmas",
            display_name="DCM Split Sigmas",
            category="DCM/sampling",
            description="Splits a schedule where the detail expert takes over; the first part ends where the second begins.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="A whole schedule."),
                io.Float.Input(
                    "boundary",
                    default=0.979,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Sigma below which the detail expert works (Wan 2.1: 0.979, HunyuanVideo: 0.982, Wan 2.2: 0.875 or 0.9).",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="high", tooltip="The semantic expert's steps."),
                io.Sigmas.Output(display_name="low", tooltip="The detail expert's steps."),
            ],
            **newer(search_aliases=["split at boundary", "high low sigmas"]),
        )

    @classmethod
    def execute(cls, sigmas: Any, boundary: float) -> io.NodeOutput:
        return io.NodeOutput(*split_sigmas(sigmas, boundary))


NODES = [DCMScheduler, DCMSplitSigmas]
