"""Compare a MODEL with its reference on the same prompts and seeds."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ....dcm_core.errors import DCMError, counted
from ....dcm_core.evaluation.collect import (
    StepErrors,
    VideoMeasures,
    make_report,
    make_steps,
)
from ....dcm_core.evaluation.report import Report, check_finite
from ....dcm_core.schedule import check_sigmas, even_sigmas
from ....dcm_core.text import LOGGER
from ..experts.attach import attached_experts, detach_experts
from ..sampling.run import empty_noise_like, make_guider, prepare_model
from ..sampling.schedules import choose_sigmas, with_shift
from ..sampling.setup import describe_run, plan_run
from .way import Tick, estimates_on, frames_of, model_way, reference_way

logger = logging.getLogger(LOGGER)

MOST_VIDEOS, LARGEST_SEED = 1000, 2**64 - 1
DEFAULT_STEPS = 50


@dataclass(frozen=True)
class Task:
    """What both models are asked for.

    Attributes:
        positives: the prompts, each a CONDITIONING.
        latent: the host's LATENT; each row of its batch is a video.
        seed, seeds: the first seed, and how many each prompt gets. Every video has its own: they are counted up over the prompts.
        image: the start image (1, height, width, 3) from 0 to 1 that the conditioning was made with.

    Raises:
        DCMError: nothing to compare, or an image without a VAE to compare it with.
    """

    positives: Sequence[list]
    negative: list | None
    latent: dict
    seed: int = 0
    seeds: int = 4
    vae: Any = None
    image: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.positives:
            raise DCMError("There is no prompt. Connect the output of a text encode node to positive.")
        if not 1 <= self.seeds * len(self.positives) <= MOST_VIDEOS:
            raise DCMError(
                f"seeds is {self.seeds} and there are {counted(len(self.positives), 'prompt')}; expected 1 to {MOST_VIDEOS} videos in all."
            )
        if not 0 <= self.seed <= LARGEST_SEED - self.seeds * len(self.positives):
            raise DCMError(f"seed is {self.seed}; expected 0 to 2**64, with room to count up.")
        if self.image is not None and self.vae is None:
            raise DCMError(
                "start_image is connected, but no vae to decode the videos' first frames with. Connect the model's VAE."
            )

    @property
    def runs(self) -> int:
        return self.seeds * len(self.positives)

    def each(self) -> Iterator[tuple[int, list, int]]:
        """Number, prompt and seed of each run."""
        for number in range(self.runs):
            yield number, self.positives[number // self.seeds], self.seed + number


@dataclass(frozen=True)
class Reference:
    """The reference: a MODEL by Euler steps at evenly spaced noise levels."""

    model: Any
    cfg: float = 1.0
    steps: int = DEFAULT_STEPS
    shift: float = 5.0

    def __str__(self) -> str:
        return f"{counted(self.steps, 'step')}, cfg {self.cfg:g}, shift {self.shift:g}"


@dataclass(frozen=True)
class Ways:
    """What is kept of the reference's runs. Each list has an entry for each run.

    Attributes:
        ways: its latents at the model's noise levels, as the model sees them.
        samples: its sampled latents for a VAE; empty without one.
    """

    ways: list[list[Tensor]]
    samples: list[Tensor]


def reference_of(model: Any, reference_model: Any, cfg: float, steps: int, shift: float) -> Reference:
    """The reference of a MODEL: another MODEL, or itself without experts.

    Raises:
        DCMError: a MODEL with other latents.
    """
    other = detach_experts(model) if reference_model is None else reference_model
    formats = [type(each.get_model_object("latent_format")).__name__ for each in (model, other)]
    channels = [each.get_model_object("latent_format").latent_channels for each in (model, other)]
    if formats[0] != formats[1] or channels[0] != channels[1]:
        raise DCMError(
            f"model and reference_model have different latents ({formats[0]} and {formats[1]}). Connect two models of the same family."
        )
    other, _ = prepare_model(other)
    return Reference(with_shift(other, "even", shift), cfg, steps, shift)


class Progress:
    """One bar over all model calls, which the user can interrupt. A line in the log for every 10 %."""

    def __init__(self, calls: int, node_id: str | None = None):
        self.bar, self.calls, self.done = comfy.utils.ProgressBar(calls, node_id=node_id), calls, 0

    def tick(self, calls: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += calls
        self.bar.update_absolute(self.done, self.calls)
        if 10 * self.done // self.calls > 10 * (self.done - calls) // self.calls:
            logger.info("Comparing: %d %% of %s", 100 * self.done // self.calls, counted(self.calls, "model call"))


def run_reference(reference: Reference, task: Task, levels: Sequence[float], tick: Tick) -> Ways:
    """Sample the reference for every prompt and seed."""
    sigmas, found = even_sigmas(reference.steps, reference.shift), Ways([], [])
    for _, positive, seed in task.each():
        guider = make_guider(reference.model, positive, task.negative, reference.cfg)
        way, result = reference_way(guider, task.latent, sigmas, levels, seed, tick)
        check_finite(way[-1], "reference")
        found.ways.append(way)
        if task.vae is not None:
            found.samples.append(result["samples"].cpu())
    return found


@dataclass(frozen=True)
class Candidate:
    """A prepared MODEL with its schedule.

    Attributes:
        owners: what runs each step, in words.
    """

    model: Any
    sigmas: Tensor
    cfg: float
    boundary: float | None
    owners: tuple[str, ...]
    words: str

    @property
    def levels(self) -> list[float]:
        return self.sigmas.tolist()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def make_candidate(model: Any, sigmas: Tensor, cfg: float, boundary: float = 0.0) -> Candidate:
    """A MODEL and its noise levels, ready to be compared.

    Raises:
        DCMError: noise levels that do not end with 0, or a boundary outside (0, 1).
    """
    if float(check_sigmas(sigmas)[-1]) != 0:
        raise DCMError(
            f"The last sigma is {float(sigmas[-1]):g}; expected 0, as finished videos are compared. Use all sigmas of the schedule."
        )
    model, boundary = prepare_model(model, boundary)
    plan = plan_run(model, sigmas, boundary)
    owners = tuple(str(plan.side(step)) for step in range(len(sigmas) - 1))
    return Candidate(model, sigmas, cfg, boundary, owners, describe_run(model, plan))


def with_schedule(model: Any, schedule: str, steps: int, shift: float, cfg: float) -> tuple[Candidate, list[str]]:
    """The same for a schedule by name, with notes about it for the user."""
    prepared, _ = prepare_model(model)
    sigmas, notes = choose_sigmas(schedule, steps, shift, 1.0, prepared)
    return make_candidate(with_shift(prepared, schedule, shift), sigmas, cfg), notes


def neighbours(candidate: Candidate) -> list[tuple[int, Candidate]]:
    """The steps beside the boundary, each with the model whose boundary is moved so that the other side runs it."""
    levels, found = candidate.levels, []
    for step in range(1, candidate.steps):
        if candidate.boundary is None or candidate.owners[step - 1] == candidate.owners[step]:
            continue
        above = levels[step - 2] if step > 1 else 1.0
        moves = {step - 1: (above + levels[step - 1]) / 2, step: (levels[step] + levels[step + 1]) / 2}
        for index, boundary in moves.items():
            if boundary < 1:
                other = make_candidate(candidate.model, candidate.sigmas, candidate.cfg, boundary)
                found.append((index, other))
    return found


def compare(
    candidate: Candidate,
    reference: Reference,
    task: Task,
    notes: Sequence[str] = (),
    node_id: str | None = None,
    ways: Ways | None = None,
) -> Report:
    """Compare a model with its reference.

    The reference runs first, for all prompts and seeds, then the model: the host changes models once.

    Args:
        ways: the reference's runs at the model's noise levels, if they were made before.

    Raises:
        DCMError: anything that does not fit, before any model call.
    """
    check_task(candidate, reference, task)
    plain = None if attached_experts(candidate.model) is None else detach_experts(candidate.model)
    beside = neighbours(candidate)
    per_run = (0 if ways else reference.steps) + candidate.steps * (2 if plain is None else 3) + len(beside)
    progress, levels = Progress(per_run * task.runs, node_id), candidate.levels
    ways = ways or run_reference(reference, task, levels, progress.tick)
    errors = StepErrors.of(candidate.steps)
    # after the reference, which often is the same model
    without = [] if plain is None else _plain_estimates(candidate, plain, task, ways, progress.tick)
    finals, samples = [], []
    for number, positive, seed in task.each():
        way = ways.ways[number]
        guider = make_guider(candidate.model, positive, task.negative, candidate.cfg)
        own = estimates_on(guider, task.latent, way, candidate.sigmas, seed, progress.tick)
        along, result = model_way(guider, task.latent, candidate.sigmas, seed, progress.tick)
        errors.add(way, levels, own, along, without.pop(0) if plain is not None else None)
        finals.append(check_finite(along[-1], "model"))
        if task.vae is not None:
            samples.append(result["samples"].cpu())
    for step, other in beside:
        part, span = candidate.sigmas[step : step + 2], slice(step, step + 2)
        for number, positive, seed in task.each():
            way = ways.ways[number]
            guider = make_guider(other.model, positive, task.negative, candidate.cfg)
            (estimate,) = estimates_on(guider, task.latent, way[span], part, seed, progress.tick)
            errors.add_other(step, other.owners[step], way, levels, estimate)
    references = [way[-1] for way in ways.ways]
    videos = measure_videos(task, finals, references, samples, ways.samples)
    settings = {
        "sigmas": levels,
        "cfg": candidate.cfg,
        "reference_steps": reference.steps,
        "reference_cfg": reference.cfg,
        "shift": reference.shift,
        "prompts": len(task.positives),
        "seed": task.seed,
        "seeds": task.seeds,
        "notes": list(notes),
    }
    steps = make_steps(levels, candidate.owners, errors)
    return make_report(
        candidate.words, str(reference), steps, videos, torch.cat(finals), torch.cat(references), settings
    )


def check_task(candidate: Candidate, reference: Reference, task: Task) -> None:
    """Find what does not fit before any model call.

    Raises:
        DCMError: names the input.
    """
    for model, cfg in ((candidate.model, candidate.cfg), (reference.model, reference.cfg)):
        for positive in task.positives:
            make_guider(model, positive, task.negative, cfg)
    if empty_noise_like(candidate.model, task.latent).is_nested:
        raise DCMError("latent_image has several parts (video and sound). Connect the latent of a video alone.")
    channels = candidate.model.get_model_object("latent_format").latent_channels
    if getattr(task.vae, "latent_channels", channels) != channels:
        raise DCMError(
            f"vae decodes latents of {counted(task.vae.latent_channels, 'channel')}, but the model's have {channels}. "
            "Connect the model's VAE."
        )


def _plain_estimates(candidate: Candidate, plain: Any, task: Task, ways: Ways, tick: Tick) -> list[list[Tensor]]:
    """What the model without experts estimates on the reference's way, for each run."""
    found = []
    for number, positive, seed in task.each():
        guider = make_guider(plain, positive, task.negative, candidate.cfg)
        found.append(estimates_on(guider, task.latent, ways.ways[number], candidate.sigmas, seed, tick))
    return found


def measure_videos(
    task: Task, finals: list[Tensor], references: list[Tensor], samples: list[Tensor], reference_samples: list[Tensor]
) -> VideoMeasures:
    """Measure each video beside its reference: decoded one after the other, or as latents without a VAE."""
    found = VideoMeasures(task.vae is not None)
    if task.vae is None:
        for video, reference in zip(torch.cat(finals), torch.cat(references), strict=True):
            found.add(video, reference)
        return found
    image = None
    for video, reference in zip(torch.cat(samples), torch.cat(reference_samples), strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels, wanted = (frames_of(task.vae, each[None]) for each in (video, reference))
        if task.image is not None and image is None:
            image = start_frame(task.image, *pixels.shape[-2:])
        found.add(pixels, wanted, image)
    return found


def start_frame(image: Tensor, height: int, width: int) -> Tensor:
    """The start image as the model saw it, (3, height, width) from -1 to 1: scaled and cut as in the host's nodes."""
    pixels = torch.movedim(image[:1, ..., :3].float(), -1, 1)
    return comfy.utils.common_upscale(pixels, width, height, "bilinear", "center")[0].cpu() * 2 - 1
