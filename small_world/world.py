"""The small world: one coloured shape that moves over a clouded ground, and the caption that names it.

Videos are (3, FRAMES, SIZE, SIZE) with values -1 .. 1; everything follows from a seed.
"""

import itertools
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, FRAMES, FPS = 64, 17, 8
LATENT = (16, 5, 8, 8)
TEXT_WIDTH = 4096

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1)}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
NAMES = list(itertools.product(COLOURS, SHAPES, MOTIONS))

# Pixels from the first frame to the last.
DISTANCE = 24.0
# The ground's clouds: width in pixels, and spread of their brightness.
CLOUD_WIDTH, CLOUD_SPREAD = 2.5, 0.08


@dataclass(frozen=True)
class Scene:
    """One video as numbers, in pixels; `clouds` is the seed of the ground's."""

    colour: str
    shape: str
    motion: str
    x: float
    y: float
    radius: float
    ground: float
    clouds: int

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape, self.motion)

    def path(self) -> Tensor:
        """Centres of the shape, (FRAMES, 2) as x, y."""
        way = (torch.linspace(-0.5, 0.5, FRAMES) * DISTANCE)[:, None]
        return torch.tensor([self.x, self.y]) + way * torch.tensor(MOTIONS[self.motion])


def caption(colour: str, shape: str, motion: str) -> str:
    return f"a {colour} {shape} moving {motion}"


CAPTIONS = [caption(*names) for names in NAMES]


def draw_scene(generator: torch.Generator, names: tuple[str, str, str] | None = None) -> Scene:
    """A random scene, of the given colour, shape and motion or of any; the shape stays inside the picture."""
    if names is None:
        names = NAMES[int(torch.randint(len(NAMES), (), generator=generator))]
    a, b, c, d = torch.rand(4, generator=generator).tolist()
    radius = 10 + 3 * a
    along, across = radius + DISTANCE / 2 + 2, radius + 2
    horizontal = MOTIONS[names[2]][0] != 0
    margin_x, margin_y = (along, across) if horizontal else (across, along)
    return Scene(
        *names,
        x=margin_x + b * (SIZE - 2 * margin_x),
        y=margin_y + c * (SIZE - 2 * margin_y),
        radius=radius,
        ground=0.35 + 0.2 * d,
        clouds=int(torch.randint(2**31, (), generator=generator)),
    )


def draw_clouds(seed: int) -> Tensor:
    """A smooth random field with mean 0 and spread CLOUD_SPREAD, (SIZE, SIZE)."""
    reach = round(3 * CLOUD_WIDTH)
    noise = torch.randn(1, 1, SIZE + 2 * reach, SIZE + 2 * reach, generator=torch.Generator().manual_seed(seed))
    bell = torch.exp(-(torch.arange(-reach, reach + 1) / CLOUD_WIDTH).square() / 2)
    bell = bell / bell.norm()
    return CLOUD_SPREAD * F.conv2d(F.conv2d(noise, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))[0, 0]


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Pixels to the outline, negative inside; x, y: from the centre. All shapes have about the same area."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.89 * radius
    height = 1.3 * radius
    slope = torch.tensor(math.pi / 6)
    side = x.abs() * torch.cos(slope) - (y + height) * torch.sin(slope)
    return torch.maximum(side, y - 0.75 * radius)


def render(scene: Scene) -> Tensor:
    """The scene's video: a grey ground with clouds that stand still, the shape with a white rim two pixels wide."""
    line = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    ground = (scene.ground + draw_clouds(scene.clouds)).expand(3, FRAMES, SIZE, SIZE)
    centre = scene.path()[:, :, None, None]
    inside = signed_distance(scene.shape, x - centre[:, 0], y - centre[:, 1], scene.radius)

    def cover(edge: Tensor) -> Tensor:
        return (0.5 - edge).clamp(0, 1)[None]

    video = torch.lerp(ground, torch.ones(()), cover(inside))
    colour = torch.tensor(COLOURS[scene.colour])[:, None, None, None].expand_as(video)
    return torch.lerp(video, colour, cover(inside + 2)) * 2 - 1


def clips(count: int, seed: int) -> list[Scene]:
    """`count` scenes, every caption equally often (as far as it divides)."""
    generator = torch.Generator().manual_seed(seed)
    return [draw_scene(generator, NAMES[index % len(NAMES)]) for index in range(count)]


def embed(text: str) -> Tensor:
    """Stand-in for a text encoder: a fixed random vector for each word, (words, TEXT_WIDTH) bfloat16; one zero for no text."""
    words = [
        torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        for word in text.split()
    ]
    return (torch.stack(words) if words else torch.zeros(1, TEXT_WIDTH)).bfloat16()
