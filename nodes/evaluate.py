"""Compare experts with a reference, and search for better settings."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import ExpertError, check_choice
from ..dcm_core.evaluation.figure import plot_report, plot_trials
from ..dcm_core.schedule import AUTO
from .experts import INDEPENDENT, STACKED, trained_inputs
from .host.compat import newer
from .host.evaluation.compare import DEFAULT_STEPS, Task, compare, reference_of, with_schedule
from .host.evaluation.tune import DETAIL, DISTANCES, SEMANTIC, STEPS, Searched, Start, make_tuner, tune
from .host.experts.expert_files import expert_names, load_expert, state_of_expert, trained_expert
from .host.folders import NONE, fingerprint, tuning_folder
from .host.report import report_picture
from .host.sampling.run import as_image
from .host.sampling.schedules import schedule_names
from .sample import cfg_input
from .schedule import SCHEDULE_TIP, STEPS_TIP

TRIALS = "trials.json"
MORE_PROMPTS = ("positive_2", "positive_3", "positive_4")
DISTANCE_TIP = (
    "What the search lowers. With error of the steps: what each step loses by itself, which needs the fewest videos. With error of the "
    "videos: how far they are from the reference's of the same noise. With energy distance: how far both sets of videos are apart."
)
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


def prompts(positive: Any, more: Mapping[str, Any]) -> list[Any]:
    """The connected prompts."""
    return [positive, *(more[name] for name in MORE_PROMPTS if more.get(name) is not None)]


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
        task = Task(prompts(positive, more), negative, latent_image, seed, seeds, vae, start_image)
        candidate, notes = with_schedule(model, schedule, steps, shift, cfg)
        reference = reference_of(model, reference_model, reference_cfg, reference_steps, shift)
        found = compare(candidate, reference, task, notes, cls.hidden.unique_id)
        plot = as_image(plot_report(found))
        text = "\n".join((str(found), *notes))
        return io.NodeOutput(plot, found.to_json(), ui=report_picture(text, plot, cls.hidden.unique_id))


class DCMTune(io.ComfyNode):
    """A base MODEL and experts -> the settings that come closest to the reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
        return io.Schema(
            node_id="DCMTune",
            display_name="DCM Tune (find settings)",
            category="DCM/evaluation",
            description=(
                "Searches for strengths, a boundary and noise levels that bring experts closest to the reference, at the same number "
                "of steps. Finished trials are kept in output/dcm_tuning, so an interrupted search resumes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model without experts. It is the reference, too."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty video latent. Every row of its batch is one more video."
                ),
                io.String.Input(
                    "name",
                    default="my_tuning",
                    tooltip="Name of the search. A search with the same name and inputs resumes from its trials.",
                ),
                io.Combo.Input(
                    "semantic_lora",
                    options=expert_names(),
                    default=NONE,
                    tooltip="The semantic expert, a file in models/loras.",
                ),
                io.Float.Input(
                    "semantic_strength", tooltip="Strength of the semantic expert at the start.", **strength
                ),
                io.Combo.Input(
                    "detail_lora",
                    options=expert_names(),
                    default=NONE,
                    tooltip="The detail expert, a file in models/loras.",
                ),
                io.Float.Input("detail_strength", tooltip="Strength of the detail expert at the start.", **strength),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="The boundary at the start. 0 uses the experts' own.",
                ),
                io.Combo.Input(
                    "experts",
                    options=[STACKED, INDEPENDENT],
                    default=STACKED,
                    tooltip="How the two experts combine, as in DCM Attach Experts.",
                ),
                io.Int.Input(
                    "calls",
                    default=2000,
                    min=1,
                    max=10_000_000,
                    tooltip="Most model calls of the search, including the reference's. The search ends earlier if no change helps.",
                ),
                io.Combo.Input("distance", options=list(DISTANCES), default=STEPS, tooltip=DISTANCE_TIP),
                io.Boolean.Input("search_strengths", default=True, tooltip="Search both strengths, from 0 to 3."),
                io.Boolean.Input(
                    "search_boundary", default=True, tooltip="Search how many steps are above the boundary."
                ),
                io.Boolean.Input(
                    "search_steps",
                    default=False,
                    tooltip="Search the noise levels of the steps, among those of the reference. Takes many more trials.",
                ),
                seed_input(),
                io.Int.Input("seeds", default=2, min=1, max=100, tooltip=SEEDS_TIP),
                io.Combo.Input("schedule", options=schedule_names(), default=AUTO, tooltip=SCHEDULE_TIP),
                io.Int.Input("steps", default=6, min=1, max=100, tooltip=STEPS_TIP),
                cfg_input(),
                *reference_inputs(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Only needed if cfg or reference_cfg is not 1."
                ),
                io.Model.Input("reference_model", optional=True, tooltip="Another model as the reference."),
                *(io.Conditioning.Input(name, optional=True, tooltip="One more prompt.") for name in MORE_PROMPTS),
                *trained_inputs(),
            ],
            outputs=[
                io.Float.Output(display_name="semantic_strength", tooltip="For DCM Attach Experts."),
                io.Float.Output(display_name="detail_strength", tooltip="For DCM Attach Experts."),
                io.Float.Output(display_name="boundary", tooltip="For DCM Attach Experts."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For DCM Sampler."),
                io.Image.Output(
                    display_name="plot", tooltip="The distance of each trial, for Preview Image or Save Image."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["optimise strength", "optimize", "find boundary", "best settings", "grid search"]),
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
        positive: Any,
        latent_image: Any,
        name: str,
        semantic_lora: str,
        semantic_strength: float,
        detail_lora: str,
        detail_strength: float,
        boundary: float,
        experts: str,
        calls: int,
        distance: str,
        search_strengths: bool,
        search_boundary: bool,
        search_steps: bool,
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
        semantic_expert: Any = None,
        detail_expert: Any = None,
        **more: Any,
    ) -> io.NodeOutput:
        file = tuning_folder(name) / TRIALS
        check_choice("experts", experts, (STACKED, INDEPENDENT), ExpertError)
        found = {
            side: trained_expert(trained, side, model) or load_expert(file, side, model)
            for side, trained, file in (
                ("semantic", semantic_expert, semantic_lora),
                ("detail", detail_expert, detail_lora),
            )
        }
        strengths = {"semantic": semantic_strength, "detail": detail_strength}
        start = Start(found, strengths, boundary, experts == STACKED, schedule, steps, shift, cfg)
        task = Task(prompts(positive, more), negative, latent_image, seed, seeds)
        reference = reference_of(model, reference_model, reference_cfg, reference_steps, shift)
        searched = Searched(search_strengths, search_boundary, search_steps)
        tuner, notes = make_tuner(model, start, reference, task, searched, distance)
        tuned = tune(tuner, calls, file, cls.hidden.unique_id)
        plot = as_image(plot_trials(tuned.trials.done))
        text = "\n".join((str(tuned), *notes))
        best = tuned.strengths
        return io.NodeOutput(
            best.get(SEMANTIC, semantic_strength),
            best.get(DETAIL, detail_strength),
            tuned.boundary,
            tuned.sigmas,
            plot,
            ui=report_picture(text, plot, cls.hidden.unique_id),
        )


NODES = [DCMCompare, DCMTune]
