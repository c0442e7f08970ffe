"""Noise levels for any sampler node."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import ScheduleError, counted
from ..dcm_core.routing import parse_boundaries, split_sigmas
from ..dcm_core.schedule import AUTO
from .host.compat import advanced, newer
from .host.report import report
from .host.sampling.schedules import choose_sigmas, schedule_names

SCHEDULE_TIP = (
    "Noise levels to use. auto: those the experts are made for; with two full models, the same as even. even: evenly spaced, for full "
    "models. DCM grid: levels that DCM experts are trained on. generic: the same as DCM grid with experts, else as even. The others are "
    "KSampler's schedulers."
)
STEPS_TIP = "Number of steps. auto ignores it, unless there are two full models. Schedules named after their steps ignore it too."
SHIFT_TIP = "Flow shift, used instead of the model's own: 17 for DCM, 5 to 12 for Wan 2.2. Schedules that ignore steps ignore it too."
DENOISE_TIP = (
    "even and KSampler's schedulers run `steps` steps from a lower noise level, as in KSampler. The others run only the last part of "
    "their steps."
)


MOST_PARTS = 5


class DCMScheduler(io.ComfyNode):
    """A schedule by name -> SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMScheduler",
            display_name="DCM Scheduler (lightx2v, few-step)",
            category="DCM/sampling",
            description="Outputs noise levels: those that DCM experts are made for, evenly spaced ones, or those of a KSampler scheduler.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=schedule_names(),
                    default=AUTO,
                    tooltip=SCHEDULE_TIP,
                ),
                io.Int.Input("steps", default=6, min=1, max=100, tooltip=STEPS_TIP),
                io.Float.Input("shift", default=17.0, min=0.01, max=100.0, step=0.1, tooltip=SHIFT_TIP),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=f"1 gives the full schedule. {DENOISE_TIP}",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model to sample. Needed by auto and KSampler's schedulers."
                ),
                io.Model.Input(
                    "detail_model",
                    optional=True,
                    tooltip="The second full model, if there is one (Wan 2.2). auto then means even.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels from high to low; the last is 0.")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lightx2v schedule", "few step schedule", "dcm sigmas"]),
        )

    @classmethod
    def execute(
        cls, preset: str, steps: int, shift: float, denoise: float, model: Any = None, detail_model: Any = None
    ) -> io.NodeOutput:
        sigmas, notes = choose_sigmas(preset, steps, shift, denoise, model, detail_model=detail_model, widget="preset")
        levels = ", ".join(f"{1000 * sigma:.4g}" for sigma in sigmas.tolist())
        return io.NodeOutput(sigmas, ui=report("\n".join((f"timesteps {levels}", *notes)), cls.hidden.unique_id))


class DCMSplitSigmas(io.ComfyNode):
    """SIGMAS and a boundary -> the high-noise and the low-noise part."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSplitSigmas",
            display_name="DCM Split Sigmas (two samplers)",
            category="DCM/sampling",
            description=(
                "Splits a schedule where the detail expert takes over, or into up to five parts. Each part ends where the next begins."
            ),
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to split."),
                io.Float.Input(
                    "boundary",
                    default=0.979,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Sigma below which the detail expert works (Wan 2.1: 0.979, HunyuanVideo: 0.982, Wan 2.2: 0.875 or 0.9).",
                ),
                io.String.Input(
                    "more_boundaries",
                    default="",
                    optional=True,
                    tooltip="Up to three more boundaries, falling, such as 0.7, 0.4. Empty for none.",
                    **advanced(io.String.Input),
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="high", tooltip="The first part: the semantic expert's steps."),
                io.Sigmas.Output(display_name="low", tooltip="The second part: the detail expert's steps."),
                *(
                    io.Sigmas.Output(
                        id=f"part_{number}",
                        display_name=f"part {number}",
                        tooltip=f"Part {number}. Only used with more_boundaries.",
                    )
                    for number in range(3, MOST_PARTS + 1)
                ),
            ],
            **newer(search_aliases=["two samplers", "split at boundary", "high low sigmas"]),
        )

    @classmethod
    def execute(cls, sigmas: Any, boundary: float, more_boundaries: str = "") -> io.NodeOutput:
        more = parse_boundaries(more_boundaries)
        if len(more) > MOST_PARTS - 2:
            raise ScheduleError(
                f"more_boundaries has {counted(len(more), 'value')}; expected at most {MOST_PARTS - 2}. Split the last part with another "
                "DCM Split Sigmas node."
            )
        parts = split_sigmas(sigmas, boundary, *more)
        # ComfyUI's samplers return the latent unchanged for an unused part
        return io.NodeOutput(*parts, *[sigmas[:0]] * (MOST_PARTS - len(parts)))


NODES = [DCMScheduler, DCMSplitSigmas]
