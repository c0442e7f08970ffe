"""The host's VAE and text encoder, for training data."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ....dcm_core.distill.data.encode import Encoders
from ....dcm_core.errors import DCMError, counted
from ....dcm_core.files.conditioning import Conditioning
from ..compat import key_patches
from .image import FIRST, NO_IMAGE, image_encoder

SAMPLED = 8  # values at each end of a tensor that represent it


def host_encoders(vae: Any, clip: Any, image_conditioning: str = NO_IMAGE, clip_vision: Any = None) -> Encoders:
    """The host's VAE, CLIP and CLIP vision objects as encoders; latents stay in the VAE's own space.

    Raises:
        DCMError: a CLIP vision model for text to video.
    """
    if clip_vision is not None and image_conditioning == NO_IMAGE:
        raise DCMError(
            f"clip_vision is set, but image_conditioning is {NO_IMAGE}. Choose {FIRST}, or remove clip_vision."
        )

    # outside nodes the host leaves gradients on, and a VAE would keep all activations
    @torch.inference_mode()
    def encode_video(pixels: Tensor) -> Tensor:
        latent = vae.encode(pixels)
        if latent.ndim != 5 or latent.shape[0] != 1:
            raise DCMError(
                f"The VAE made a latent of shape {tuple(latent.shape)} from {counted(len(pixels), 'frame')}; expected one video. "
                "Connect the VAE of Wan 2.1 or HunyuanVideo."
            )
        return latent[0]

    def free() -> None:
        unload([vae.patcher, clip.patcher, *([] if clip_vision is None else [clip_vision.patcher])])

    text_id = weights_id(clip.patcher, type(clip.tokenizer).__name__, clip.layer_idx, clip.tokenizer_options)
    text = Encoders(encode_video, caption_encoder(clip), weights_id(vae.patcher), text_id, free)
    if image_conditioning == NO_IMAGE:
        return text
    vision_id = "" if clip_vision is None else weights_id(clip_vision.patcher)
    encode_image = image_encoder(image_conditioning, vae, clip_vision)
    return replace(text, encode_image=encode_image, image_id=f"{image_conditioning} {vision_id}")


def caption_encoder(clip: Any) -> Callable[[str], Conditioning]:
    """The host's CLIP as an encoder of captions. Brackets are plain text here; in a prompt they weight words."""

    @torch.inference_mode()
    def encode(text: str) -> Conditioning:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))

    return encode


def weights_id(patcher: Any, *settings: Any) -> str:
    """A hash of a model: its class, its weights and the patches on them, and `settings`.

    It covers the name, shape, dtype and the values at both ends of every tensor, so that it is fast for any size.
    """
    digest = hashlib.sha256(f"{type(patcher.model).__name__} {settings}".encode())
    for name, weight_and_patches in sorted(key_patches(patcher).items()):
        digest.update(name.encode())
        _add(digest, weight_and_patches)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a weight or a patch to the hash: numbers and tensors in lists, tuples and adapters."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        ends = torch.cat([flat[:SAMPLED].float(), flat[-SAMPLED:].float()])
        digest.update(f"{value.dtype} {tuple(value.shape)} {ends.tolist()}".encode())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    elif isinstance(value, (str, int, float, type(None))):
        digest.update(repr(value).encode())
    elif hasattr(value, "weights"):
        _add(digest, value.weights)


def unload(patchers: list[Any]) -> None:
    """Unload these models and their clones from their devices; others stay loaded."""
    loaded = comfy.model_management.current_loaded_models
    others = [
        entry
        for entry in loaded
        if entry.model is None or not any(patcher.is_clone(entry.model) for patcher in patchers)
    ]
    for device in {patcher.load_device for patcher in patchers}:
        comfy.model_management.free_memory(1e30, device, keep_loaded=others)
