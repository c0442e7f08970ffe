"""Write a video with the host's own code."""

from fractions import Fraction
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, Types
from torch import Tensor


def save_video(vae: Any, latent: Tensor, fps: int, path: Path) -> None:
    """Decode a latent (1, channels, frames, height, width) in the VAE's space and write it as mp4."""
    frames = vae.decode(latent)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, audio=None, frame_rate=Fraction(fps)))
    video.save_to(str(path))
