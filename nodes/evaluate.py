"""Compare experts with a reference."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.evaluation.figure import plot_report
from ..dcm_core.schedule import AUTO
from .host.compat import newer
from .host.evaluation.compare import DEFAULT_STEPS, Task, compare, reference_of, with_schedule
from .host.report import report_picture
from .host.sampling.run import as_image
from .host.sampling.schedules import schedule_names
from .sample import cfg_input
from .schedule import SCHEDULE_TIP, STEPS_TIP

MORE_PROMPTS = ("positive_2", "positive_3", "positive_4")
SEEDS_TIP = "Number of videos for each prompt. With more of them, small differences become certain."
VAE_TIP = "Decodes the videos, which are then compared as frames. Without it, their latents are compared."


def seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFF,
        # unchanged after a run: other seeds are another comparison
        control_after_generate=False,
        tooltip="Seed of the first video. Every video has its own seed, counted up from it.",
    )


def reference_inputs() -> list[io.Input]:
    """What the reference is."""
    return [
        io.Int.Input(
            "reference_steps",
            default=DEFAULT_STEPS,
            min=2,
            max=1000,
            tooltip="Steps of the reference, evenly spaced before the shift.",
        ),
        io.Float.Input(
            "reference_cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance scale of the reference, such as 5 for Wan 2.1. Above 1, it needs a negative and twice the calls.",
        ),
        io.Float.Input(
            "shift",
            default=5.0,
            min=0.01,
            max=100.0,
            step=0.1,
            tooltip="Flow shift of the reference, and of the schedule if it uses one.",
        ),
    ]


class DCMCompare(io.ComfyNode):
    """A MODEL with experts and its reference -> a report in words, as a picture and as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMCompare",
            display_name="DCM Compare (evaluate experts)",
            category="DCM/evaluation",
            description=(
                "Measures how near a model with experts comes to its reference: the same model without experts and with many steps. "
                "It says which steps lose most, which expert runs them, and how motion, sharpness and colour differ."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A model with experts (DCM Load Model, DCM Attach Experts)."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty video latent. Every row of its batch is one more video."
                ),
                seed_input(),
                io.Int.Input("seeds", default=4, min=1, max=100, tooltip=SEEDS_TIP),
                io.Combo.Input("schedule", options=schedule_names(), default=AUTO, tooltip=SCHEDULE_TIP),
                io.Int.Input("steps", default=6, min=1, max=100, tooltip=STEPS_TIP),
                cfg_input(),
                *reference_inputs(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Only needed if cfg or reference_cfg is not 1."
                ),
                io.Model.Input(
                    "reference_model",
                    optional=True,
                    tooltip="Another model as the reference, such as one with other experts. By default it is the model without experts.",
                ),
                io.Vae.Input("vae", optional=True, tooltip=VAE_TIP),
                *(io.Conditioning.Input(name, optional=True, tooltip="One more prompt.") for name in MORE_PROMPTS),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="For image to video: the image that the prompt was made with. First frames are compared with it; needs vae.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="plot", tooltip="The report as a picture, for Preview Image or Save Image."
                ),
                io.String.Output(display_name="json", tooltip="The report for programs."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(
                search_aliases=[
                    "evaluate",
                    "measure quality",
                    "compare models",
                    "motion amount",
                    "slow motion",
                    "benchmark",
                ]
            ),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: Any,
        seed: int,
        seeds: int,
        schedule: str,
        steps: int,
        cfg: float,
        reference_steps: int,
        reference_cfg: float,
        shift: float,
        negative: Any = None,
        reference_model: Any = None,
        vae: Any = None,
        start_image: Any = None,
        **more: Any,
    ) -> io.NodeOutput:
        positives = [positive, *(more[name] for name in MORE_PROMPTS if more.get(name) is not None)]
        task = Task(positives, negative, latent_image, seed, seeds, vae, start_image)
        candidate, notes = with_schedule(model, schedule, steps, shift, cfg)
        reference = reference_of(model, reference_model, reference_cfg, reference_steps, shift)
        found = compare(candidate, reference, task, notes, cls.hidden.unique_id)
        plot = as_image(plot_report(found))
        text = "\n".join((str(found), *notes))
        return io.NodeOutput(plot, found.to_json(), ui=report_picture(text, plot, cls.hidden.unique_id))


NODES = [DCMCompare]
