"""What a training run shows while it works: progress, losses, samples."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ....dcm_core.distill.checkpoint_file import History
from ....dcm_core.distill.config import TrainingConfig
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.divergence import skipped_in_words
from ....dcm_core.distill.run_log import RunLog
from ....dcm_core.errors import DCMError
from ....dcm_core.experts.expert import Expert
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.files.writing import write_tensors
from ....dcm_core.inspection.loss_plot import plot_losses
from ....dcm_core.routing import split_sigmas
from ....dcm_core.schedule import sigmas_from_timesteps
from ....dcm_core.text import LOGGER
from ..experts.attach import attach_experts, require_family
from ..report import tell
from ..sampling.run import make_guider
from ..video import save_video
from .image import host_values

logger = logging.getLogger(LOGGER)

# time between plots on the node, and between lines in the log
SHOW_SECONDS, LOG_SECONDS = 1.0, 30.0
# name of the latent in the file between the samples of two models
HANDOVER = "latent"
# points in a long run's plot on the node
PLOT_POINTS = 4000


def in_words(terms: dict[str, float]) -> str:
    """The losses of a step in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items() if name != "step")


@dataclass
class Show:
    """Shows the progress of a run: a bar, the losses as text and as a plot, and samples.

    Attributes:
        model: the base.
        semantic: the semantic expert under a detail expert.
        folder: where sample videos are written, if there is a VAE to decode them.
        reload: called after a sample, which leaves its experts' patches in the shared weights.
        notes: what the user should know about the run, shown as long as it lasts.
        handover: with two models, the file in which the semantic expert's sample ends and from which the detail expert's starts.
    """

    model: Any
    semantic: Expert | None
    config: TrainingConfig
    data: Dataset
    folder: Path
    node_id: str | None
    reload: Callable[[], None]
    vae: Any = None
    notes: Sequence[str] = ()
    handover: Path | None = None
    picture: Image.Image | None = None
    resumed_in_words: str = ""
    skipped_in_words: str = ""
    shown: float = 0.0
    logged: float = 0.0

    def __post_init__(self) -> None:
        self.log = RunLog(self.folder, self.config)
        self.bar = comfy.utils.ProgressBar(self.config.steps, node_id=self.node_id)

    def resumed(self, words: str) -> None:
        """Show these words as long as the run lasts."""
        self.resumed_in_words = words
        tell(words, self.node_id)

    def skipped(self, words: str) -> None:
        """Say it, and show it as long as the run lasts."""
        self.skipped_in_words = words
        logger.warning(words)

    def stopped(self, saved: int, steps: int, error: BaseException) -> None:
        """Say what was saved: the host shows no result of an interrupted run."""
        text = (
            f"Saved at step {saved} of {steps}."
            if saved
            else "Stopped before the first step was done. Nothing was saved."
        )
        if not isinstance(error, DCMError):
            # our own errors already say what to do first
            text += " Queue again to continue." if self.node_id else " Run the same command again to continue."
        logger.info(text)
        tell(text, self.node_id)

    def step(self, history: History, steps: int) -> None:
        """Update bar, text and plot. Raises if the user has interrupted."""
        done, now = len(history), time.monotonic()
        self.log.step(history)
        pace = [f"learning rate {self.log.rate:.3g}"]
        if self.log.speed:
            left = tqdm.format_interval(self.log.seconds_left(steps - done))
            pace += [f"steps/s {self.log.speed:.3g}", f"time left {left}"]
        text = f"Step {done} of {steps}: {in_words(history[-1])}, {', '.join(pace)}"
        skipped = (skipped_in_words(history), self.skipped_in_words) if self.skipped_in_words else ()
        tell("\n".join(filter(None, (text, *self.notes, self.resumed_in_words, *skipped))), self.node_id)
        if now - self.logged > LOG_SECONDS or done == steps:
            logger.info(text)
            self.logged = now
        preview = None
        if now - self.shown > SHOW_SECONDS or done == steps:
            # the newest step is always drawn
            preview = ("JPEG", self._preview(history[:: -(1 + done // PLOT_POINTS)][::-1]), 768)
            self.shown = time.monotonic()
        self.bar.update_absolute(done, steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def sample(self, done: int, expert: Expert) -> None:
        """Sample a video of each prompt with the code of the sampler nodes. A failure does not end the run."""
        with self._unless_it_fails(done):
            self._show(done, self._samples(expert))
        self.reload()

    def sampled(self, done: int, latents: list[Tensor]) -> None:
        """Show videos that all processes sampled together. A failure does not end the run."""
        with self._unless_it_fails(done):
            self._show(done, latents)

    @contextmanager
    def _unless_it_fails(self, done: int) -> Iterator[None]:
        try:
            with torch.inference_mode():
                yield
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            logger.warning("Could not make the sample video at step %d: %s", done, error)

    def _samples(self, expert: Expert) -> list[Tensor]:
        model, samples = with_experts(self.model, expert, self.semantic), self.data.samples()
        latents = []
        for number, (prompt, clip) in enumerate(samples):
            handover = self.handover and numbered(self.handover, number, len(samples))
            extras = {"guidance": self.config.guidance, **host_values(self.data.image(clip))}
            conditioning = [[context.clone(), {**extras, **more}] for context, more in prompt]
            latents.append(
                sample_latent(model, conditioning, self.data.latent(clip), expert, self.config.seed, handover)
            )
        return latents

    def _show(self, done: int, latents: list[Tensor]) -> None:
        self.picture = stacked([preview_strip(self.model, latent) for latent in latents])
        for number, latent in enumerate(latents if self.vae is not None else ()):
            file = numbered(self.folder / f"sample_{done:08d}.mp4", number, len(latents))
            save_video(self.vae, self.model.model.process_latent_out(latent), require_family(self.model).fps, file)

    def _preview(self, history: History) -> Image.Image:
        plot = plot_losses(history, "loss")
        if self.picture is None:
            return plot
        strip = self.picture.resize((plot.width, max(1, self.picture.height * plot.width // self.picture.width)))
        return stacked([plot, strip])


def numbered(path: Path, number: int, count: int) -> Path:
    """The file of one of `count` samples. One alone has no number."""
    return path if count == 1 else path.with_stem(f"{path.stem}_{number + 1}")


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    both = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        both.paste(picture, (0, top))
        top += picture.height
    return both


def with_experts(model: Any, expert: Expert, other: Expert | None) -> Any:
    """The base with the trained expert and the other expert."""
    if expert.role == "detail":
        return attach_experts(model, other, expert)
    return attach_experts(model, expert, other)


def sample_latent(
    model: Any, conditioning: Any, clip: Tensor, expert: Expert, seed: int, handover: Path | None = None
) -> Tensor:
    """One video by the host's Euler sampler on the expert's own schedule, in the transformer's latent space.

    The other one of two models is not loaded: its steps are left out. The semantic expert then gives its last estimate above
    the boundary. The detail expert starts at the boundary, from `handover` or else from `clip` with noise.
    """
    guider = make_guider(model, conditioning, None, cfg=1.0)
    noise = torch.randn((1, *clip.shape), generator=torch.Generator().manual_seed(seed))
    start, sigmas = torch.zeros_like(noise), sigmas_from_timesteps(expert.timesteps)
    if expert.pair is not None:
        high, low = split_sigmas(sigmas, expert.boundary)
        sigmas = high if expert.role == "semantic" else low
        if expert.role == "detail" and handover is not None and handover.is_file():
            # it has its noise
            start, noise = TensorFile(handover).read(HANDOVER), torch.zeros_like(noise)
        elif expert.role == "detail":
            start = clip.clone().float()[None]
    estimates: list[Tensor] = []
    sampler = comfy.samplers.sampler_object("euler")
    out = guider.sample(
        noise,
        start,
        sampler,
        sigmas,
        callback=lambda step, denoised, x, steps: estimates.append(denoised),
        disable_pbar=True,
        seed=seed,
    )
    if sigmas[-1] > 0:
        if handover is not None:
            write_tensors(handover, {HANDOVER: out.float().cpu()}, {"format": "pt"})
        return estimates[-1].float().cpu()
    return model.model.process_latent_in(out.float().cpu())


def preview_strip(model: Any, latent: Tensor) -> Image.Image:
    """First, middle and last frame side by side, previewed like the host's latents."""
    previewer = latent_preview.Latent2RGBPreviewer(
        model.model.latent_format.latent_rgb_factors, model.model.latent_format.latent_rgb_factors_bias
    )
    frames = latent.shape[2]
    pictures = [previewer.decode_latent_to_preview(latent[:, :, [frame]]) for frame in (0, frames // 2, frames - 1)]
    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * picture.width, 0))
    return strip
