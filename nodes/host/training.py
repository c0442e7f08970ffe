"""Train an expert on the host's model: its memory, its progress, its sampler for the samples."""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import attention_pytorch
from PIL import Image
from torch import Tensor

from ...dcm_core.distill.backbone import Backbone
from ...dcm_core.distill.batches import generator_of
from ...dcm_core.distill.config import TrainingConfig, TrainingError
from ...dcm_core.distill.dataset import TrainingData
from ...dcm_core.distill.parallel import join
from ...dcm_core.distill.trainee import new_detail, new_semantic
from ...dcm_core.distill.trainer import Result, Trainer
from ...dcm_core.experts import Expert, expert_id, size_of, write_expert
from ...dcm_core.families import FAMILIES, Family
from ...dcm_core.plot import plot_losses
from ...dcm_core.schedule import sigmas_from_timesteps
from .attach import attach_experts, compute_dtype, detach_experts, diffusion_model, module_shapes, require_family
from .compat import gradients
from .encoders import weights_id
from .expert_files import NONE, load_expert
from .folders import LORAS, new_file, run_folder
from .report import tell
from .sampling import as_image, make_guider
from .video import save_video

logger = logging.getLogger("ComfyUI-DCM")

# between two plots on the node
SHOW_SECONDS = 1.0


def gradient_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The host's attention that has a gradient, whichever it samples with."""
    return attention_pytorch(*args, **kwargs)


def make_backbone(model: Any, family: Family, config: TrainingConfig) -> Backbone:
    """The transformer of a loaded MODEL."""
    return Backbone(
        diffusion_model(model).requires_grad_(False),
        family,
        compute_dtype(model),
        lambda: {"optimized_attention_override": gradient_attention},
        config.checkpointing,
    )


def in_words(terms: dict[str, float]) -> str:
    """The losses of a step in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items() if name != "step")


@dataclass
class Show:
    """Tells the user how a run goes: a bar, the losses in words and as a plot, samples.

    Attributes:
        folder: where sample videos are written, if there is a VAE to decode them.
    """

    model: Any
    below: Expert | None
    config: TrainingConfig
    data: TrainingData
    folder: Path
    node_id: str | None
    vae: Any = None
    history: list[dict[str, float]] = field(default_factory=list)
    picture: Image.Image | None = None
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(self.config.steps, node_id=self.node_id)

    def step(self, done: int, steps: int, terms: dict[str, float]) -> None:
        """Update bar, text and plot; raises where the user has interrupted."""
        self.history.append(terms)
        tell(f"step {done}/{steps}: {in_words(terms)}", self.node_id)
        preview = None
        if time.monotonic() - self.shown > SHOW_SECONDS or done == steps:
            preview, self.shown = ("JPEG", self._preview(), 768), time.monotonic()
        self.bar.update_absolute(done, steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def sample(self, done: int, expert: Expert) -> None:
        """A video of the first caption, by the sampling code of the sampler nodes."""
        with torch.inference_mode():
            model = with_experts(self.model, expert, self.below)
            conditioning = [[context.clone(), dict(extras)] for context, extras in self.data.conditioning(0)]
            latent = sample_latent(model, conditioning, self.data.shape(0), expert, self.config.seed)
            self.picture = preview_strip(model, latent)
            if self.vae is not None:
                latent = model.model.process_latent_out(latent)
                save_video(self.vae, latent, FAMILIES[expert.family].fps, self.folder / f"sample_{done:08d}.mp4")

    def _preview(self) -> Image.Image:
        plot = plot_losses(self.history, "loss")
        if self.picture is None:
            return plot
        strip = self.picture.resize((plot.width, max(1, self.picture.height * plot.width // self.picture.width)))
        both = Image.new("RGB", (plot.width, plot.height + strip.height))
        both.paste(plot, (0, 0))
        both.paste(strip, (0, plot.height))
        return both


def with_experts(model: Any, expert: Expert, other: Expert | None) -> Any:
    """The base with the trained expert and the one it belongs with."""
    if expert.role == "detail":
        return attach_experts(model, other, expert)
    return attach_experts(model, expert, other)


def sample_latent(model: Any, conditioning: Any, shape: tuple[int, ...], expert: Expert, seed: int) -> Tensor:
    """One video by the host's Euler sampler on the expert's own schedule, as the transformer sees it."""
    guider = make_guider(model, conditioning, None, cfg=1.0)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    sampler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas_from_timesteps(expert.timesteps), disable_pbar=True, seed=seed)
    return model.model.process_latent_in(out.float().cpu())


def preview_strip(model: Any, latent: Tensor) -> Image.Image | None:
    """First, middle and last frame side by side, as the host previews latents."""
    previewer = latent_preview.Latent2RGBPreviewer(
        model.model.latent_format.latent_rgb_factors, model.model.latent_format.latent_rgb_factors_bias
    )
    frames = latent.shape[2]
    pictures = [previewer.decode_latent_to_preview(latent[:, :, [frame]]) for frame in (0, frames // 2, frames - 1)]
    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * picture.width, 0))
    return strip


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        plots: a picture of each loss, (losses, height, width, 3).
    """

    model: Any
    result: Result
    file: Path
    plots: Tensor

    @property
    def expert(self) -> Expert:
        return self.result.expert

    def __str__(self) -> str:
        last = self.result.history[-1]
        steps = f"{int(last['step'])} steps, {self.result.seconds:.0f} s in this run"
        return f"{self.expert}\n{steps}: {in_words(last)}\nsaved to {self.file}"


def train_and_save(
    model: Any,
    data: TrainingData,
    config: TrainingConfig,
    name: str,
    continue_from: str = NONE,
    semantic_lora: str = NONE,
    semantic_expert: Expert | None = None,
    *,
    vae: Any = None,
    node_id: str | None = None,
) -> Run:
    """Train under a name: the states in the output folder, the expert among the host's LoRAs.

    Raises:
        DCMError: before any training, for whatever does not fit.
    """
    folder = run_folder(name)
    file = new_file(LORAS, f"dcm/{name.strip()}", overwrite=True)
    below = semantic_expert or load_expert(semantic_lora, "semantic", model)
    start = load_expert(continue_from, config.expert, model)
    result = train_expert(model, data, config, folder, start=start, below=below, vae=vae, node_id=node_id)
    save_expert(file, result.expert, model)
    terms = [term for term in result.history[-1] if term != "step"]
    plots = torch.cat([as_image(plot_losses(result.history, term)) for term in terms])
    return Run(with_experts(model, result.expert, below), result, file, plots)


def train_expert(
    model: Any,
    data: TrainingData,
    config: TrainingConfig,
    folder: Path,
    *,
    start: Expert | None = None,
    below: Expert | None = None,
    vae: Any = None,
    node_id: str | None = None,
) -> Result:
    """Train, or resume what `folder` holds; the MODEL is afterwards as it was.

    Args:
        start: an expert to go on from, instead of a fresh one.
        below: the semantic expert under a detail expert.

    Raises:
        DCMError: data, settings or a state that do not fit.
    """
    family = require_family(model)
    config = config.for_family(family)
    base = detach_experts(model)
    check_latents(base, data)
    device = base.load_device
    with torch.inference_mode(False), torch.enable_grad(), gradients():
        expert = first_expert(base, family, config, start, below)
        comfy.model_management.load_models_gpu([base], memory_required=5 * 4 * size_of(expert))
        trainer = Trainer(
            make_backbone(base, family, config),
            data,
            config,
            expert,
            folder,
            device,
            below=below,
            # cloned: what the host made in inference mode has no place in a backward pass
            latent_in=lambda latent: base.model.process_latent_in(latent.clone().float()),
            facts=facts_of(base, data, start, below),
            watcher=Show(base, below, config, data, folder, node_id, vae),
            processes=join(device),
        )
        make_room(trainer, base, config)
        return trainer.run()


def facts_of(base: Any, data: TrainingData, start: Expert | None, below: Expert | None) -> dict[str, str]:
    """What a resumed run has to share beside its settings."""
    names = {"data": data.fingerprint, "model": weights_id(base)}
    return names | {name: expert_id(expert) for name, expert in (("start", start), ("semantic expert", below)) if expert}


def make_room(trainer: Trainer, base: Any, config: TrainingConfig) -> None:
    """Tell how much memory the run takes, refuse what cannot fit, and offload what of the base is in the way.

    Raises:
        TrainingError: too little memory even with the base offloaded.
    """
    memory = trainer.memory()
    logger.info("%s", memory)
    free = comfy.model_management.get_free_memory(trainer.device)
    offloadable = base.loaded_size() if base.load_device != base.offload_device else 0
    # the trained tensors themselves are there already
    memory.check(free + offloadable + memory.trained // 5, config)
    if memory.beside_base > free and offloadable:
        base.partially_unload(base.offload_device, memory.beside_base - free)


def first_expert(model: Any, family: Family, config: TrainingConfig, start: Expert | None, below: Expert | None) -> Expert:
    """What training begins with.

    Raises:
        TrainingError: an expert of another family.
    """
    modules = dict(diffusion_model(model).named_modules())
    generator = generator_of(config.seed, 0, 0)
    for given in (start, below):
        if given is not None and given.family != family.name:
            raise TrainingError(f"The expert is of {given.family}, the model is {family.title}. Choose an expert made for this model.")
    if start is not None:
        expert = replace(start, role=config.expert)
    elif config.expert == "semantic":
        expert = new_semantic(family, modules, config.rank, config.alpha, generator)
    else:
        expert = new_detail(family, modules, config.rank, config.alpha, generator, below)
    return replace(expert, boundary=config.boundary, timesteps=config.timesteps(family))


def check_latents(model: Any, data: TrainingData) -> None:
    """Raises TrainingError for latents that the model cannot take."""
    channels = model.model.latent_format.latent_channels
    for bucket in data.buckets:
        shape = data.shape(bucket[0])
        if shape[0] != channels:
            raise TrainingError(
                f"The dataset's latents have {shape[0]} channels, the model takes {channels}. Encode the clips with the model's own VAE."
            )


def save_expert(path: Path, expert: Expert, model: Any) -> None:
    """Write the expert as a LoRA file that the host, and DCMAttachExperts, load."""
    write_expert(path, expert, module_shapes(model), torch.bfloat16)
    logger.info("saved %s to %s", expert, path)
