"""Sample with two experts."""

import time
from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import counted
from ..dcm_core.schedule import AUTO
from .host.compat import advanced, newer
from .host.experts.halves import missing_half
from .host.experts.route import step_cache_note
from .host.report import report, show
from .host.sampling.plan import announce
from .host.sampling.run import choose_sampler, make_guider, memory_warning, prepare_model, run
from .host.sampling.schedules import EULER, choose_sigmas, sampler_names, schedule_names, with_shift
from .host.sampling.setup import describe_run, plan_run
from .schedule import DENOISE_TIP, SCHEDULE_TIP, SHIFT_TIP, STEPS_TIP

DETAIL_MODEL_TIP = (
    "A second full model for the low-noise side (Wan 2.2 A14B low noise). It is loaded when its side begins."
)
BOUNDARY_TIP = (
    "Sigma below which the detail side works. 0 uses the experts' own boundary. With a detail_model, 0 means 0.875 (text to video) or "
    "0.9 (image to video)."
)


def side_inputs() -> list[io.Input]:
    """Inputs for the low-noise side, on both sampling nodes."""
    return [
        io.Model.Input("detail_model", optional=True, tooltip=DETAIL_MODEL_TIP),
        io.Float.Input(
            "detail_cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="cfg of the detail side. 0 means the same as cfg.",
            **advanced(io.Float.Input),
        ),
        io.Float.Input(
            "boundary",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=False,
            optional=True,
            tooltip=BOUNDARY_TIP,
            **advanced(io.Float.Input),
        ),
    ]


def cfg_input() -> io.Input:
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Guidance scale. Set 1 for DCM experts: one model call per step and no negative needed.",
    )


class DCMSampler(io.ComfyNode):
    """MODEL with experts -> LATENT: one trajectory, each step run by its expert."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSampler",
            display_name="DCM Sampler (Wan 2.2 high/low MoE)",
            category="DCM/sampling",
            description=(
                "Samples a video in 4 to 6 steps and one trajectory. The semantic expert runs the high-noise steps, the detail "
                "expert the low-noise steps. The text on the node says which expert runs which step."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model with experts (DCM Load Model, DCM Attach Experts), or the high-noise model.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty video latent, or a video to start from (denoise below 1)."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed for the initial noise. The same seed gives the same noise as in KSampler.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=schedule_names(),
                    default=AUTO,
                    tooltip=SCHEDULE_TIP,
                ),
                io.Int.Input("steps", default=6, min=1, max=100, tooltip=STEPS_TIP),
                cfg_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=f"1 makes a new video. Below 1, sampling starts from latent_image. {DENOISE_TIP}",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Only needed if cfg or detail_cfg is not 1."
                ),
                *side_inputs(),
                io.Float.Input(
                    "shift",
                    default=17.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip=SHIFT_TIP,
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from another node. Overrides schedule, steps, shift and denoise.",
                ),
                io.Sampler.Input(
                    "sampler", optional=True, tooltip="A sampler from another node. Overrides sampler_name."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=sampler_names(),
                    default=EULER,
                    optional=True,
                    tooltip="The sampler, as in KSampler. DCM is distilled for euler.",
                    **advanced(io.Combo.Input),
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled video latent, for VAE Decode."),
                io.Latent.Output(display_name="denoised", tooltip="The last denoised estimate."),
            ],
            hidden=[io.Hidden.unique_id],
            **newer(
                search_aliases=[
                    "wan 2.2 high low",
                    "wan 2.2 sampler",
                    "high noise low noise",
                    "two samplers",
                    "two models one sampler",
                    "moe sampler",
                    "few step",
                    "few step video",
                    "4 step sampler",
                    "lightx2v",
                    "dual expert sampler",
                ]
            ),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict,
        seed: int,
        schedule: str,
        steps: int,
        cfg: float,
        denoise: float,
        negative: Any = None,
        detail_model: Any = None,
        detail_cfg: float = 0.0,
        boundary: float = 0.0,
        shift: float = 17.0,
        sigmas: Any = None,
        sampler: Any = None,
        sampler_name: str = EULER,
    ) -> io.NodeOutput:
        chosen_sampler = choose_sampler(sampler, sampler_name)
        half = missing_half(model, detail_model)
        model, boundary = prepare_model(model, boundary, detail_model, cfg, detail_cfg)
        notes: list[str] = []
        if sigmas is None:
            # the name of a connected sampler is not known
            sigmas, notes = choose_sigmas(
                schedule, steps, shift, denoise, model, EULER if sampler is not None else sampler_name
            )
            model = with_shift(model, schedule, shift)
        plan = plan_run(model, sigmas, boundary)
        guider = make_guider(model, positive, negative, cfg, detail_cfg)
        notes += filter(None, [half, memory_warning(guider, latent_image)])
        lines = [describe_run(model, plan), *notes]
        report("\n".join(lines), cls.hidden.unique_id)
        announce(sigmas, plan, notes, cls.hidden.unique_id)
        started = time.perf_counter()
        latent, denoised = run(guider, latent_image, chosen_sampler, sigmas, seed, cls.hidden.unique_id)
        seconds = time.perf_counter() - started
        took = f"{counted(plan.steps, 'step')} in {seconds:.1f} s, {seconds / plan.steps:.2f} s a step"
        text = "\n".join(filter(None, (*lines, took, step_cache_note(model))))
        return io.NodeOutput(latent, denoised, ui=show(text, cls.hidden.unique_id))


class DCMGuider(io.ComfyNode):
    """MODEL(s) and prompts -> GUIDER for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMGuider",
            display_name="DCM Guider",
            category="DCM/sampling",
            description=(
                "Guider for SamplerCustomAdvanced. Runs each step with its attached expert or with a second model, and with its "
                "own cfg."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A model with experts, or the high-noise model."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                cfg_input(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Only needed if cfg or detail_cfg is not 1."
                ),
                *side_inputs(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            **newer(search_aliases=["dual expert guider", "dual model guider", "cfg per expert", "moe guider"]),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        cfg: float,
        negative: Any = None,
        detail_model: Any = None,
        detail_cfg: float = 0.0,
        boundary: float = 0.0,
    ) -> io.NodeOutput:
        model, _ = prepare_model(model, boundary, detail_model, cfg, detail_cfg)
        return io.NodeOutput(make_guider(model, positive, negative, cfg, detail_cfg))


NODES = [DCMSampler, DCMGuider]
