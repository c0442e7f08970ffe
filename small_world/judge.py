"""What a video of the small world shows, measured: its colour, shape and motion. `dcm_core.evaluation.measures` has what any video has."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from world import COLOURS, MOTIONS, SHAPES

from dcm_core.evaluation import measures

# Shape area over its bounding box.
FILL = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
SATURATED = 0.35
# Pixels around the shape that are not the ground: its rim, and what the VAE blurs.
NEAR = 4


@dataclass(frozen=True)
class Seen:
    """What a video shows; None where no shape is found.

    Attributes:
        path: the shape's centre in every frame, (frames, 2), NaN where it is lost.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    path: Tensor

    def matches(self, names: tuple[str, str, str]) -> tuple[bool, bool, bool]:
        """Whether colour, shape and motion are the named ones."""
        return self.colour == names[0], self.shape == names[1], self.motion == names[2]


def look(video: Tensor) -> Seen:
    """Find the shape by its saturation; video: (3, frames, height, width) in -1 .. 1."""
    pixels, mask = (video + 1) / 2, _saturated(video)
    area = mask.sum((1, 2)).float()
    line = torch.arange(video.shape[-1]) + 0.5
    x, y = (mask * line).sum((1, 2)) / area, (mask * line[:, None]).sum((1, 2)) / area
    path = torch.stack([x, y], 1)
    found = area > 40
    path[~found] = math.nan
    if int(found.sum()) < len(found) // 2:
        return Seen(None, None, None, path)
    mean = torch.stack([pixels[channel][mask].mean() for channel in range(3)])
    colour = min(COLOURS, key=lambda name: float((torch.tensor(COLOURS[name]) - mean).norm()))
    fills = [_fill(frame) for frame, good in zip(mask, found, strict=True) if good]
    fill = sorted(fills)[len(fills) // 2]
    shape = min(SHAPES, key=lambda name: abs(FILL[name] - fill))
    good = path[found]
    way = good[-1] - good[0]
    moved = float(way.norm()) > 6
    motion = max(MOTIONS, key=lambda name: float((torch.tensor(MOTIONS[name]) * way).sum())) if moved else None
    return Seen(colour, shape, motion, path)


def _saturated(video: Tensor) -> Tensor:
    """Where the shape is, (frames, height, width): all else is grey."""
    pixels = (video + 1) / 2
    return pixels.amax(0) - pixels.amin(0) > SATURATED


def _fill(mask: Tensor) -> float:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    return float(mask.sum()) / (height * width)


def unevenness(path: Tensor) -> float:
    """Pixels by which a path strays from even motion along a straight line (root mean square); NaN if the shape is lost."""
    if path.isnan().any():
        return math.nan
    time = torch.linspace(-1, 1, len(path))
    design = torch.stack([torch.ones_like(time), time], 1)
    fit = design @ torch.linalg.lstsq(design, path).solution
    return float((path - fit).square().sum(1).mean().sqrt())


def path_distance(a: Tensor, b: Tensor) -> float:
    """Mean distance of two paths in pixels; NaN if either is lost."""
    return float((a - b).norm(dim=1).mean())


def flicker(video: Tensor) -> float:
    """Mean change from frame to frame of the ground, which stands still: of what is never near the shape."""
    shape = _saturated(video).any(0)
    near = F.max_pool2d(shape[None].float(), 2 * NEAR + 1, stride=1, padding=NEAR)[0] > 0
    return measures.flicker(video, ~near)
