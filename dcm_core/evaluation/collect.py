"""Collect the measures of videos, one after the other, and make the report of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import measures
from .report import Measure, Report, SetDistance, Step, Value, compare_sets, mean, ratio

# Names of measures as the report shows them, and their kind.
RATIOS = ("motion", "sharpness", "contrast", "saturation", "flicker")
DRIFTS = ("contrast drift", "saturation drift")
FIRST_FRAME = "first-frame fidelity"
# Equal frames, in dB.
HIGHEST_PSNR = 100.0
# Pixels that a spectrum needs a side, and frames that it is taken of: of a longer video, every second one, or fewer.
SMALLEST, SPECTRUM_FRAMES = 6, 32


@dataclass
class StepErrors:
    """Errors of denoised estimates at each step. Every list has an entry (rows,) for each batch of videos.

    Attributes:
        change: sums (rows, 3) of `measures.change_sums`.
        other: step, counted from 0 -> what runs it on the other side of the boundary, and the `own` errors then.
    """

    distance: list[list[Tensor]]
    own: list[list[Tensor]]
    plain: list[list[Tensor]]
    change: list[list[Tensor]]
    other: dict[int, tuple[str, list[Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: int) -> "StepErrors":
        return cls(*([[] for _ in range(steps)] for _ in range(4)))

    def add(
        self,
        way: Sequence[Tensor],
        sigmas: Sequence[float],
        own: Sequence[Tensor],
        along: Sequence[Tensor],
        plain: Sequence[Tensor] | None,
    ) -> None:
        """Add a batch of videos (rows, channels, frames, height, width).

        Args:
            way: the reference's latents at `sigmas`, noise included; one more than there are steps.
            own, along: the model's denoised estimates of each step at the reference's latents, and at its own.
            plain: those of the model without experts at the reference's latents.
        """
        for step, (found, ran) in enumerate(zip(own, along, strict=True)):
            target, scale = step_target(way, sigmas, step)
            self.own[step].append(row_rms(found - target) / scale)
            self.distance[step].append(row_rms(ran - target) / scale)
            if plain is not None:
                self.plain[step].append(row_rms(plain[step] - target) / scale)
                self.change[step].append(measures.change_sums(found, plain[step], target))

    def add_other(
        self, step: int, owner: str, way: Sequence[Tensor], sigmas: Sequence[float], estimate: Tensor
    ) -> None:
        """Add the estimate of what runs the step on the other side of the boundary, at the reference's latents."""
        target, scale = step_target(way, sigmas, step)
        self.other.setdefault(step, (owner, []))[1].append(row_rms(estimate - target) / scale)


def step_target(way: Sequence[Tensor], sigmas: Sequence[float], step: int) -> tuple[Tensor, Tensor]:
    """The denoised estimate that a step needs to stay with the reference, and the unit of its errors (rows,)."""
    target = measures.step_target(way[step], way[step + 1], sigmas[step], sigmas[step + 1])
    return target, spread(way[-1])


def row_rms(difference: Tensor) -> Tensor:
    """Root mean square of each video of a batch, (rows,)."""
    return difference.flatten(1).double().square().mean(1).sqrt()


def spread(latent: Tensor) -> Tensor:
    """Standard deviation of each video of a batch, (rows,)."""
    return latent.flatten(1).double().std(1, correction=0).clamp(min=1e-6)


@dataclass
class VideoMeasures:
    """Measures of videos beside their references. Every list has an entry for each video.

    Attributes:
        decoded: whether the videos are pixels; else they are latents.
        found: name -> (the model's, the reference's).
        spectra: log power of both.
    """

    decoded: bool
    found: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    spectra: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, video: Tensor, reference: Tensor, image: Tensor | None = None) -> None:
        """Measure a video and its reference, (channels, frames, height, width).

        Args:
            image: the start image that both were made from, (channels, height, width).
        """
        several = video.shape[1] > 1
        if several:
            self._note("motion", measures.motion, video, reference)
            still = measures.still_places(reference)
            self._note("flicker", lambda each: measures.flicker(each, still), video, reference)
        for name, of in (("contrast", measures.contrast), ("saturation", measures.saturation)):
            if name == "saturation" and not self.decoded:
                # the channels of a latent are not colours
                continue
            self._note(name, lambda each, of=of: float(of(each).mean()), video, reference)
            if several:
                self._note(f"{name} drift", lambda each, of=of: measures.drift(of(each)), video, reference)
        if image is not None:
            self._note(FIRST_FRAME, lambda each: min(measures.psnr(each[:, 0], image), HIGHEST_PSNR), video, reference)
        if min(video.shape[-2:]) >= SMALLEST:
            some = slice(None, None, 1 + video.shape[1] // SPECTRUM_FRAMES)
            self.spectra.append(tuple(measures.spectrum(each[None, :, some]) for each in (video, reference)))
            self._note_pair("sharpness", measures.sharpness(*self.spectra[-1]), 1.0)

    def _note(self, name: str, of: Any, video: Tensor, reference: Tensor) -> None:
        self._note_pair(name, of(video), of(reference))

    def _note_pair(self, name: str, found: float, reference: float) -> None:
        self.found.setdefault(name, []).append((found, reference))

    def spectrum(self) -> list[float]:
        """Amplitude by spatial frequency as a share of the reference's: geometric mean over the videos. Empty for tiny frames."""
        if not self.spectra:
            return []
        logs = torch.stack([found - reference for found, reference in self.spectra]).mean(0)
        return logs.div(2).exp().tolist()

    def measures(self) -> list[Measure]:
        """Ratios first, then drifts, then what only image to video has."""
        found = []
        for name in (*RATIOS, *DRIFTS, FIRST_FRAME):
            if name not in self.found:
                continue
            model, reference = torch.tensor(self.found[name], dtype=torch.float64).T
            means = float(model.mean()), float(reference.mean())
            if name in RATIOS:
                if means[1] > 0:
                    found.append(Measure(name, ratio(model, reference), *means))
            else:
                unit = "dB" if name == FIRST_FRAME else ""
                found.append(Measure(name, mean(model - reference), *means, kind="difference", unit=unit))
        return found


def make_steps(sigmas: Sequence[float], owners: Sequence[str], errors: StepErrors) -> list[Step]:
    """The steps of the report.

    Args:
        owners: what runs each step, in words.
    """

    def value(entries: list[Tensor]) -> Value | None:
        return mean(torch.cat(entries)) if entries else None

    steps = []
    for index, owner in enumerate(owners):
        factor, gain = None, 0.0
        if errors.change[index]:
            product, size, needed = torch.cat(errors.change[index]).T
            if float(size.sum()) > 0:
                factor = ratio(product, size)
                error = float((needed - 2 * product + size).sum())
                best = float(needed.sum()) - factor.value * float(product.sum())
                gain = 1 - math.sqrt(max(0.0, best) / error) if error > 0 else 0.0
        other = errors.other.get(index)
        steps.append(
            Step(
                index + 1,
                sigmas[index],
                owner,
                value(errors.distance[index]),
                value(errors.own[index]),
                value(errors.plain[index]),
                factor,
                gain,
                other and (other[0], value(other[1])),
            )
        )
    return steps


def make_report(
    run: str,
    reference: str,
    steps: Sequence[Step],
    videos: VideoMeasures,
    latents: Tensor,
    reference_latents: Tensor,
    settings: Mapping[str, Any],
) -> Report:
    """The report of all videos, with the distances of the sets of their final latents (videos, channels, frames, height, width)."""
    sets: list[SetDistance | None] = [compare_sets("videos", latents, reference_latents)]
    if latents.shape[2] > 1:
        sets.append(compare_sets("motion", latents.diff(dim=2), reference_latents.diff(dim=2)))
    return Report(
        run,
        reference,
        len(latents),
        videos.decoded,
        steps,
        videos.measures(),
        [found for found in sets if found],
        videos.spectrum(),
        settings,
    )
