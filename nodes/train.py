"""Train experts."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.distill.config import SETTINGS, TrainingConfig
from ..dcm_core.distill.recipes import CUSTOM, RECIPES, changed_settings, recipe_of
from ..dcm_core.routing import Side
from .dataset import Dataset
from .experts import TrainedExpert
from .host.compat import advanced, newer
from .host.experts.attach import require_family
from .host.experts.expert_files import expert_names, state_of_expert
from .host.folders import NONE, fingerprint
from .host.report import report
from .host.training.run import Run, train_and_save

WIDGETS = {int: io.Int.Input, float: io.Float.Input, bool: io.Boolean.Input, str: io.Combo.Input}


def setting_input(side: Side, name: str, *, input_id: str = "", seldom: bool = False, **changed: Any) -> io.Input:
    """The input of a training setting, made from its `Setting`.

    Args:
        input_id: its name in saved graphs, if another.
        seldom: shown with the advanced inputs.
        changed: what is different on a node.
    """
    about, default = SETTINGS[name], getattr(TrainingConfig, name)
    widget = WIDGETS[type(default)]
    values: dict[str, Any] = {"options": list(about.options)} if about.options else {"default": default}
    if about.widget is not None:
        values |= zip(("min", "max", "step"), about.widget, strict=True)
    values |= {"tooltip": about.help_for(side), **(advanced(widget) if seldom else {})}
    return widget(input_id or name, **values | changed)


def first_inputs(side: Side) -> list[io.Input]:
    """The first inputs of both nodes."""
    return [
        io.Model.Input(
            "model",
            tooltip="Base model without experts: Wan 2.1, Wan 2.2 A14B or HunyuanVideo. It is the teacher and stays unchanged.",
        ),
        Dataset.Input("dataset", tooltip="Encoded clips from DCM Video Dataset."),
        io.String.Input(
            "name",
            default=f"my_{side}_expert",
            tooltip="Name of the run. Checkpoints are kept in output/dcm_training/<name>; a run with the same name and settings resumes "
            "from them. The expert is saved as models/loras/dcm/<name>.safetensors.",
        ),
    ]


def common_inputs(side: Side) -> list[io.Input]:
    """Settings of both nodes."""
    # a detail expert is a LoRA; its node shows the paper's rate, which 0 stands for
    rate, rank = ({"default": 5e-6}, {"min": 1}) if side == "detail" else ({}, {})
    return [
        setting_input(side, "steps"),
        setting_input(side, "learning_rate", round=False, **rate),
        setting_input(side, "rank", **rank),
        setting_input(side, "alpha"),
        setting_input(side, "batch_size"),
        setting_input(side, "gradient_accumulation_steps", input_id="accumulate"),
        # unchanged after a run: another seed would be another run
        setting_input(side, "seed", control_after_generate=False),
        setting_input(side, "boundary", round=False),
        setting_input(side, "gradient_checkpointing"),
    ]


def last_inputs(side: Side) -> list[io.Input]:
    """Settings that seldom change."""
    return [
        setting_input(side, "shift", seldom=True),
        setting_input(side, "sample_steps", seldom=True),
        setting_input(side, "phases", seldom=True),
        setting_input(side, "cfg", seldom=True),
        setting_input(side, "ema_decay", seldom=True, round=False),
        setting_input(side, "scheduler", seldom=True),
        setting_input(side, "save_every", seldom=True),
        setting_input(side, "held_out", seldom=True),
        # the node shows them
        setting_input(side, "sample_every", seldom=True, default=100),
        io.Combo.Input(
            "continue_from",
            options=expert_names(),
            default=NONE,
            optional=True,
            tooltip="Start from this expert file instead of from zero.",
        ),
        io.Vae.Input(
            "vae", optional=True, tooltip="Decodes the sample videos, which are saved in output/dcm_training/<name>."
        ),
    ]


def further_inputs(side: Side) -> list[io.Input]:
    """Last, as saved graphs store values by position."""
    names = ("guidance", "warmup_steps", "keep", "entry_share", "caption_dropout")
    return [
        *(setting_input(side, name, seldom=True, optional=True) for name in names),
        io.Combo.Input(
            "recipe",
            options=[CUSTOM, *RECIPES],
            default=CUSTOM,
            optional=True,
            tooltip="Uses the settings of the official training scripts wherever you left the default. The node lists what it set. "
            "custom uses this node's settings alone.",
        ),
        setting_input(side, "optimizer", seldom=True, optional=True),
        setting_input(side, "offload_activations", seldom=True, optional=True),
    ]


def with_recipe(name: str, config: TrainingConfig, model: Any) -> tuple[TrainingConfig, str]:
    """The config with a recipe in place of defaults, and what that means as text. On a node every setting has a value, so a value
    that differs from the default is the user's own.

    Raises:
        TrainingError: a recipe for another model.
    """
    recipe = recipe_of(name)
    if recipe is None:
        return config, ""
    recipe.check(require_family(model))
    config = recipe.applied(config, changed_settings(config))
    return config, f"{recipe.in_words(config)}\n"


def outputs() -> list[io.Output]:
    """The outputs of both nodes."""
    return [
        io.Model.Output(
            display_name="trained_model", tooltip="The model with the trained expert on it, for any sampler."
        ),
        TrainedExpert.Output(display_name="expert", tooltip="The expert itself, for DCM Attach Experts."),
        io.String.Output(display_name="file", tooltip="Where the expert was saved."),
        io.Image.Output(display_name="losses", tooltip="A plot of each loss."),
    ]


DETAIL_MODEL_TIP = (
    "The low-noise model, if model is the high-noise one of two (Wan 2.2 A14B). The expert is then trained for boundary 0.875 (text to "
    "video) or 0.9 (image to video), and its file knows both models."
)
SEMANTIC_MODEL_TIP = (
    "The high-noise model, if model is the low-noise one of two (Wan 2.2 A14B). The expert is then trained on model alone, for boundary "
    "0.875 (text to video) or 0.9 (image to video), and its file knows both models."
)


def output_of(run: Run, words: str, node_id: str | None) -> io.NodeOutput:
    """The outputs of both nodes after a run. `words` go before its own text."""
    return io.NodeOutput(run.model, run.expert, str(run.file), run.plots, ui=report(f"{words}{run}", node_id))


class DCMTrainSemanticExpert(io.ComfyNode):
    """MODEL + clips -> the expert for layout and motion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMTrainSemanticExpert",
            display_name="DCM Train Semantic Expert",
            category="DCM/training",
            description=(
                "Distils the high-noise steps of a model into a few-step expert, with consistency and temporal coherence "
                "losses. An interrupted run is saved; queue it again with the same settings to resume it."
            ),
            inputs=[
                *first_inputs("semantic"),
                *common_inputs("semantic"),
                setting_input("semantic", "temporal_weight", seldom=True),
                *last_inputs("semantic"),
                *further_inputs("semantic"),
                io.Model.Input("detail_model", optional=True, tooltip=DETAIL_MODEL_TIP),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["train lora", "distill", "consistency distillation", "train high noise"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, continue_from: str | None = NONE, **inputs: Any) -> tuple[int, ...]:
        return state_of_expert(continue_from)

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: Any,
        name: str,
        accumulate: int,
        continue_from: str = NONE,
        vae: Any = None,
        detail_model: Any = None,
        recipe: str = CUSTOM,
        **settings: Any,
    ) -> io.NodeOutput:
        config = TrainingConfig("semantic", gradient_accumulation_steps=accumulate, **settings)
        config, words = with_recipe(recipe, config, model)
        run = train_and_save(
            model,
            dataset,
            config,
            name,
            continue_from,
            other_model=detail_model,
            vae=vae,
            node_id=cls.hidden.unique_id,
        )
        return output_of(run, words, cls.hidden.unique_id)


class DCMTrainDetailExpert(io.ComfyNode):
    """MODEL + clips -> the expert for detail, on top of a semantic one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMTrainDetailExpert",
            display_name="DCM Train Detail Expert",
            category="DCM/training",
            description=(
                "Distils the low-noise steps of a model into a few-step expert on top of a semantic expert, with consistency, "
                "adversarial and feature matching losses. An interrupted run is saved; queue it again with the same settings to "
                "resume it."
            ),
            inputs=[
                *first_inputs("detail"),
                *common_inputs("detail"),
                setting_input("detail", "adversarial_weight", seldom=True),
                setting_input("detail", "discriminator_learning_rate", seldom=True, round=False),
                setting_input("detail", "discriminator_width", seldom=True),
                *last_inputs("detail"),
                io.Combo.Input(
                    "semantic_lora",
                    options=expert_names(),
                    default=NONE,
                    optional=True,
                    tooltip="Semantic expert on top of which this expert is trained. If it was trained on the high-noise model of two "
                    "(Wan 2.2 A14B), it only sets the boundary. none uses the base model alone.",
                ),
                TrainedExpert.Input(
                    "semantic_expert",
                    optional=True,
                    tooltip="The semantic expert directly from its training; overrides semantic_lora.",
                ),
                setting_input("detail", "every_linear", seldom=True, optional=True),
                *further_inputs("detail"),
                io.Model.Input("semantic_model", optional=True, tooltip=SEMANTIC_MODEL_TIP),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["train lora", "distill", "adversarial distillation", "train low noise"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(
        cls, continue_from: str | None = NONE, semantic_lora: str | None = NONE, **inputs: Any
    ) -> list[tuple[int, ...]]:
        return [state_of_expert(continue_from), state_of_expert(semantic_lora)]

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: Any,
        name: str,
        accumulate: int,
        continue_from: str = NONE,
        vae: Any = None,
        semantic_lora: str = NONE,
        semantic_expert: Any = None,
        semantic_model: Any = None,
        recipe: str = CUSTOM,
        **settings: Any,
    ) -> io.NodeOutput:
        config = TrainingConfig("detail", gradient_accumulation_steps=accumulate, **settings)
        config, words = with_recipe(recipe, config, model)
        run = train_and_save(
            model,
            dataset,
            config,
            name,
            continue_from,
            semantic_lora,
            semantic_expert,
            other_model=semantic_model,
            vae=vae,
            node_id=cls.hidden.unique_id,
        )
        return output_of(run, words, cls.hidden.unique_id)


NODES = [DCMTrainSemanticExpert, DCMTrainDetailExpert]
