"""Measures of videos, of sets of videos and of the steps of a sampling run. docs/report.md names their sources.

Videos are (channels, frames, height, width), pixels from -1 to 1 or latents. Sigmas are as in `schedule`.
"""

import math

import torch
from torch import Tensor

# From black to white.
PIXEL_RANGE = 2.0


def rms(difference: Tensor) -> float:
    """Root mean square of all values."""
    return float(difference.square().mean().sqrt())


def energy_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Energy distance between the distributions of two sets of points, and its standard error (Székely and Rizzo).

    `(2 E|a - b| - E|a - a'| - E|b - b'|) / sqrt(d)` for points of d values, with a jackknife over the points. Point i of
    both sets comes from the same noise, so i is not compared with i: equal sets give 0.

    Args:
        a, b: (points, ...), at least two. With two, the error is infinite.
    """
    count = len(a)
    # the same origin for both, near the points: far from it, products lose digits
    center = b.flatten(1).double().mean(0)
    a, b = (points.flatten(1).double() - center for points in (a, b))
    between = torch.cdist(a, b)
    apart = (between + between.T - torch.cdist(a, a) - torch.cdist(b, b)) / math.sqrt(a.shape[1])
    apart.fill_diagonal_(0)
    total = apart.sum()
    distance = float(total / (count * (count - 1)))
    if count < 3:
        return distance, math.inf
    without = (total - 2 * apart.sum(1)) / ((count - 1) * (count - 2))
    error = (without - without.mean()).square().sum().mul((count - 1) / count).sqrt()
    return distance, float(error)


def motion(video: Tensor) -> float:
    """Amplitude of the motion: root mean square of the differences between successive frames. 0 for one frame."""
    return rms(video.diff(dim=-3)) if video.shape[-3] > 1 else 0.0


def motion_difference(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of the videos' changes from frame to frame."""
    return float((a.diff(dim=-3) - b.diff(dim=-3)).abs().mean())


def still_places(video: Tensor, share: float = 0.5) -> Tensor:
    """The places of a picture that change least in a video, at least this share of them: (height, width) of bool."""
    change = video.diff(dim=-3).abs().mean((0, 1))
    return change <= change.flatten().quantile(share)


def flicker(video: Tensor, still: Tensor) -> float:
    """Mean absolute change from frame to frame where nothing should move (VBench's temporal flickering, before its scaling).

    Args:
        still: (height, width) of bool.
    """
    return float(video.diff(dim=1)[..., still].abs().mean())


def edge_strength(video: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, across plus down."""
    return float(video.diff(dim=-1).abs().mean() + video.diff(dim=-2).abs().mean())


def spectrum(videos: Tensor) -> Tensor:
    """Log power of the frames by spatial frequency, averaged over directions (radial power spectrum).

    Args:
        videos: (videos, channels, frames, height, width).

    Returns:
        Natural logarithms for 1, 2 ... cycles over the shorter side, below half its pixels.
    """
    height, width = videos.shape[-2:]
    size = min(height, width)
    power = torch.fft.fft2(videos).abs().square().mean((0, 1, 2))
    down, across = (torch.fft.fftfreq(side) * size for side in (height, width))
    radius = torch.hypot(down[:, None], across[None]).round().long()
    bins = torch.stack([power[radius == r].mean() for r in range(1, size // 2)])
    return bins.log()


def sharpness(video: Tensor, reference: Tensor) -> float:
    """Amplitude of the fine half of the spatial frequencies as a share of the reference's, from two log spectra."""
    fine = len(video) // 2
    return float((video[fine:] - reference[fine:]).mean().div(2).exp())


def saturation(video: Tensor) -> Tensor:
    """Mean chroma of each frame, (frames,): the largest minus the smallest of red, green and blue, from 0 to 1."""
    return (video.amax(0) - video.amin(0)).mean((-2, -1)) / PIXEL_RANGE


def contrast(video: Tensor) -> Tensor:
    """RMS contrast of each frame, (frames,): standard deviation over the places, root mean square over the channels (Peli)."""
    return video.flatten(2).var(2, correction=0).mean(0).sqrt()


def drift(values: Tensor) -> float:
    """Relative change of a value from the first to the last frame, along the line of least squares. 0 for one frame."""
    frames = len(values)
    if frames < 2:
        return 0.0
    time = torch.arange(frames, dtype=torch.float64) - (frames - 1) / 2
    values = values.double()
    slope = (time * values).sum() / time.square().sum()
    return float(slope * (frames - 1) / values.mean().clamp(min=1e-6))


def psnr(frame: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels from -1 to 1; infinite for equal ones."""
    error = rms(frame - image)
    return 20 * math.log10(PIXEL_RANGE / error) if error else math.inf


def euler_state(x: Tensor, denoised: Tensor, start: float, sigma: float) -> Tensor:
    """The state at `sigma` on the Euler step that leaves the state `x` at `start`: `D + sigma / start (x - D)`."""
    return torch.lerp(denoised, x, sigma / start)


def step_target(before: Tensor, after: Tensor, start: float, end: float) -> Tensor:
    """The denoised estimate with which one Euler step leads from a state at sigma `start` to one at sigma `end`.

    `(start after - end before) / (start - end)`: the mean of the denoised estimates on the way, weighted by 1 / sigma².
    """
    return (start * after - end * before) / (start - end)


def change_sums(estimate: Tensor, without: Tensor, target: Tensor) -> Tensor:
    """Sums for the factor by which an expert's change of an estimate would come closest to the target (least squares).

    With c = estimate - without and n = target - without, the columns (rows, 3) are c·n, c² and n². The factor is c·n / c².

    Args:
        estimate, without, target: (rows, ...).
    """
    change, needed = ((value - without).flatten(1).double() for value in (estimate, target))
    return torch.stack([(change * needed).sum(1), change.square().sum(1), needed.square().sum(1)], 1)
