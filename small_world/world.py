"""The small world: one coloured shape that moves over a striped ground, and the caption that names it.

Videos are (3, FRAMES, SIZE, SIZE) with values -1 .. 1; everything follows from a seed.
"""

import itertools
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, FRAMES, FPS = 80, 17, 8
LATENT = (16, 5, 10, 10)
TEXT_WIDTH = 4096

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1)}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
NAMES = list(itertools.product(COLOURS, SHAPES, MOTIONS))


@dataclass(frozen=True)
class Scene:
    """One video as numbers: pixels, and pixels over the whole video for `distance`."""

    colour: str
    shape: str
    motion: str
    x: float
    y: float
    radius: float
    distance: float
    ground: float
    stripes: float
    upright: bool

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape, self.motion)

    def path(self) -> Tensor:
        """Centres of the shape, (FRAMES, 2) as x, y."""
        way = (torch.linspace(-0.5, 0.5, FRAMES) * self.distance)[:, None]
        return torch.tensor([self.x, self.y]) + way * torch.tensor(MOTIONS[self.motion])


def caption(colour: str, shape: str, motion: str) -> str:
    return f"a {colour} {shape} moving {motion}"


CAPTIONS = [caption(*names) for names in NAMES]


def draw_scene(generator: torch.Generator, names: tuple[str, str, str] | None = None) -> Scene:
    """A random scene, of the given colour, shape and motion or of any; the shape stays inside the picture."""
    if names is None:
        names = NAMES[int(torch.randint(len(NAMES), (), generator=generator))]
    a, b, c, d, e, f = torch.rand(6, generator=generator).tolist()
    radius, distance = 9 + 6 * a, 20 + 16 * b
    along, across = radius + distance / 2 + 2, radius + 2
    horizontal = MOTIONS[names[2]][0] != 0
    margin_x, margin_y = (along, across) if horizontal else (across, along)
    return Scene(
        *names,
        x=margin_x + c * (SIZE - 2 * margin_x),
        y=margin_y + d * (SIZE - 2 * margin_y),
        radius=radius,
        distance=distance,
        ground=0.25 + 0.3 * e,
        stripes=8 * f,
        upright=bool(torch.rand((), generator=generator) < 0.5),
    )


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
    """The scene's video: a striped grey ground, the shape with a white rim two pixels wide."""
    line = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    wave = torch.sin(2 * math.pi * ((x if scene.upright else y) + scene.stripes) / 8)
    ground = (scene.ground + 0.08 * wave + 0.15 * (y / SIZE - 0.5))[None, None].expand(3, FRAMES, SIZE, SIZE)
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
    words = [torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))) for word in text.split()]
    return (torch.stack(words) if words else torch.zeros(1, TEXT_WIDTH)).bfloat16()
