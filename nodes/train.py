"""Train experts."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.distill.config import SCHEDULERS, TrainingConfig
from .dataset import Dataset
from .experts import TrainedExpert
from .host.compat import advanced, newer
from .host.experts.expert_files import expert_names, state_of_expert
from .host.folders import NONE, fingerprint
from .host.report import report
from .host.training.run import train_and_save


def first_inputs(side: str) -> list[io.Input]:
    """The first inputs of both nodes."""
    return [
        io.Model.Input(
            "model",
            tooltip="Base model without experts: Wan 2.1 or HunyuanVideo. It is the teacher and stays unchanged.",
        ),
        Dataset.Input("dataset", tooltip="Encoded clips from DCM Video Dataset."),
        io.String.Input(
            "name",
            default=f"my_{side}_expert",
            tooltip="Name of the run. Checkpoints are kept in output/dcm_training/<name>; a run with the same name and settings resumes "
            "from them. The expert is saved as models/loras/dcm/<name>.safetensors.",
        ),
    ]


def common_inputs(steps: int, learning_rate: float, rank_floor: int) -> list[io.Input]:
    """The settings both stages share."""
    full = " 0 trains every weight of the model." if rank_floor == 0 else ""
    return [
        io.Int.Input(
            "steps",
            default=steps,
            min=1,
            max=1_000_000,
            tooltip="Total optimiser steps. Raise it to train a finished run further.",
        ),
        io.Float.Input(
            "learning_rate",
            default=learning_rate,
            min=0.0,
            max=1.0,
            step=1e-7,
            round=False,
            tooltip="Peak learning rate of AdamW. 0 uses 1e-4 for a semantic LoRA, 1e-6 for rank 0 and 5e-6 for a detail expert.",
        ),
        io.Int.Input("rank", default=128, min=rank_floor, max=1024, tooltip=f"LoRA rank (released models: 128).{full}"),
        io.Float.Input(
            "alpha",
            default=256.0,
            min=0.01,
            max=4096.0,
            step=0.5,
            tooltip="LoRA scale is alpha / rank (released models: 2). If you change rank, change alpha too.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Videos in memory at once."),
        io.Int.Input(
            "accumulate", default=1, min=1, max=1024, tooltip="Gradient accumulation: batches per optimiser step."
        ),
        io.Int.Input(
            # left alone after a run: another seed would be another run
            "seed",
            default=0,
            min=0,
            max=2**31,
            control_after_generate=False,
            tooltip="Seed for initial weights, noise and clip order.",
        ),
        io.Float.Input(
            "boundary",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=False,
            tooltip="Sigma between the two experts, saved with the expert. Both experts need the same value. 0 uses the boundary of the "
            "other expert, else the family's default (Wan 2.1: 0.979, HunyuanVideo: 0.982).",
        ),
        io.Boolean.Input(
            "gradient_checkpointing", default=True, tooltip="Needs much less memory and makes training somewhat slower."
        ),
    ]


def last_inputs() -> list[io.Input]:
    """Settings that seldom change."""
    return [
        io.Float.Input(
            "shift", default=17.0, min=0.01, max=100.0, tooltip="Shift of the noise levels.", **advanced(io.Float.Input)
        ),
        io.Int.Input(
            "sample_steps",
            default=6,
            min=1,
            max=50,
            **advanced(io.Int.Input),
            tooltip="Number of sampling steps the expert is made for. Only used when shift is not 17, the value of the released models.",
        ),
        io.Int.Input(
            "phases",
            default=1,
            min=1,
            max=50,
            **advanced(io.Int.Input),
            tooltip="Consistency phases of this expert (released models: 1). With as many phases as steps, every step is one jump.",
        ),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=30.0,
            step=0.1,
            **advanced(io.Float.Input),
            tooltip="KSampler's cfg minus 1: the teacher's w in cond + w (cond - negative). 0 turns guidance off. The expert learns the "
            "guidance and then samples at cfg 1.",
        ),
        io.Float.Input(
            "ema_decay",
            default=0.95,
            min=0.0,
            max=0.9999,
            step=0.01,
            round=False,
            **advanced(io.Float.Input),
            tooltip="EMA decay. The averaged weights are what gets saved; 0 turns averaging off.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            tooltip="How the learning rate changes after warm-up.",
            **advanced(io.Combo.Input),
        ),
        io.Int.Input(
            "save_every",
            default=100,
            min=1,
            max=100_000,
            tooltip="Steps between checkpoints.",
            **advanced(io.Int.Input),
        ),
        io.Int.Input(
            "held_out",
            default=0,
            min=0,
            max=10_000,
            **advanced(io.Int.Input),
            tooltip="Number of clips kept out of training to measure the held-out loss.",
        ),
        io.Int.Input(
            "sample_every",
            default=100,
            min=0,
            max=100_000,
            **advanced(io.Int.Input),
            tooltip="Steps between sample videos. 0 makes none.",
        ),
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


def further_inputs() -> list[io.Input]:
    """After all others, as saved graphs hold values by their place."""
    return [
        io.Float.Input(
            "guidance",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            **advanced(io.Float.Input),
            tooltip="Embedded guidance of HunyuanVideo, for training and sample videos.",
        ),
        io.Int.Input(
            "warmup_steps",
            default=10,
            min=0,
            max=100_000,
            optional=True,
            **advanced(io.Int.Input),
            tooltip="Steps over which the learning rate rises to its peak.",
        ),
        io.Int.Input(
            "keep",
            default=2,
            min=1,
            max=1000,
            optional=True,
            **advanced(io.Int.Input),
            tooltip="How many of the most recent checkpoints to keep.",
        ),
        io.Float.Input(
            "entry_share",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            **advanced(io.Float.Input),
            tooltip="Share of training spent at the noise levels where a phase begins, from which the expert's steps start. The rest is "
            "spread over all noise levels. Use it with as many phases as steps.",
        ),
    ]


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


class DCMTrainSemanticExpert(io.ComfyNode):
    """MODEL + clips -> the expert for layout and motion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMTrainSemanticExpert",
            display_name="DCM Train Semantic Expert",
            category="DCM/training",
            description=(
                "Distils the high-noise steps of a model into an expert that needs few steps, with consistency and temporal coherence "
                "losses. An interrupted run is saved; queue it again with the same settings to resume it."
            ),
            inputs=[
                *first_inputs("semantic"),
                *common_inputs(1000, 0.0, rank_floor=0),
                io.Float.Input(
                    "temporal_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    **advanced(io.Float.Input),
                    tooltip="Weight of the temporal coherence loss, which improves motion.",
                ),
                *last_inputs(),
                *further_inputs(),
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
        gradient_checkpointing: bool,
        continue_from: str = NONE,
        vae: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        config = TrainingConfig("semantic", checkpointing=gradient_checkpointing, **settings)
        run = train_and_save(model, dataset, config, name, continue_from, vae=vae, node_id=cls.hidden.unique_id)
        return io.NodeOutput(run.model, run.expert, str(run.file), run.plots, ui=report(str(run), cls.hidden.unique_id))


class DCMTrainDetailExpert(io.ComfyNode):
    """MODEL + clips -> the expert for detail, on top of a semantic one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMTrainDetailExpert",
            display_name="DCM Train Detail Expert",
            category="DCM/training",
            description=(
                "Distils the low-noise steps of a model into an expert that needs few steps, on top of a semantic expert, with "
                "consistency, adversarial and feature matching losses. An interrupted run is saved; queue it again with the same "
                "settings to resume it."
            ),
            inputs=[
                *first_inputs("detail"),
                *common_inputs(1000, 5e-6, rank_floor=1),
                io.Float.Input(
                    "adversarial_weight",
                    default=0.1,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    **advanced(io.Float.Input),
                    tooltip="Weight of the GAN and feature matching losses, which improve sharpness. 0 uses the consistency loss alone.",
                ),
                io.Float.Input(
                    "discriminator_learning_rate",
                    default=5e-6,
                    min=1e-9,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    **advanced(io.Float.Input),
                    tooltip="Learning rate of the discriminator.",
                ),
                io.Int.Input(
                    "discriminator_width",
                    default=1024,
                    min=32,
                    max=4096,
                    step=32,
                    **advanced(io.Int.Input),
                    tooltip="Channels of the discriminator's heads. Small models need fewer.",
                ),
                *last_inputs(),
                io.Combo.Input(
                    "semantic_lora",
                    options=expert_names(),
                    default=NONE,
                    optional=True,
                    tooltip="Semantic expert on top of which this expert is trained. none uses the base model alone.",
                ),
                TrainedExpert.Input(
                    "semantic_expert",
                    optional=True,
                    tooltip="The semantic expert directly from its training; overrides semantic_lora.",
                ),
                io.Boolean.Input(
                    "every_linear",
                    default=False,
                    optional=True,
                    **advanced(io.Boolean.Input),
                    tooltip="Trains a LoRA on every linear layer of the blocks, feed-forward too; the release trains attention only. Helps "
                    "on top of a fully fine-tuned semantic expert. The file is larger.",
                ),
                *further_inputs(),
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
        gradient_checkpointing: bool,
        continue_from: str = NONE,
        vae: Any = None,
        semantic_lora: str = NONE,
        semantic_expert: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        config = TrainingConfig("detail", checkpointing=gradient_checkpointing, **settings)
        run = train_and_save(
            model,
            dataset,
            config,
            name,
            continue_from,
            semantic_lora,
            semantic_expert,
            vae=vae,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(run.model, run.expert, str(run.file), run.plots, ui=report(str(run), cls.hidden.unique_id))


NODES = [DCMTrainSemanticExpert, DCMTrainDetailExpert]
