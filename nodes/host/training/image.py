"""Image to video: the host's image conditioning, made from clips and as the transformer takes it."""

from collections.abc import Callable, Collection
from typing import Any

import comfy.clip_vision
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ....dcm_core.distill.batches import ImageIn
from ....dcm_core.distill.config import TrainingError
from ....dcm_core.distill.data.dataset import ImageConditioning
from ....dcm_core.errors import counted
from ....dcm_core.families import WAN
from ..experts.attach import diffusion_model, image_channels, require_family

NO_IMAGE, FIRST, FIRST_AND_LAST = "none", "first frame", "first and last frame"
IMAGE_CONDITIONINGS = (NO_IMAGE, FIRST, FIRST_AND_LAST)
# the host's name of what a CLIP vision model makes; of its parts, the host's models use one
VISION = "clip_vision_output"


def image_encoder(kind: str, vae: Any, clip_vision: Any = None) -> Callable[[Tensor], ImageConditioning]:
    """Makes from a clip's pixels what the host's image-to-video node of that `kind` makes from its frames."""
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo

    def seen(image: Tensor) -> Any:
        # as in the host's own workflows
        return None if clip_vision is None else clip_vision.encode_image(image, crop=False)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> ImageConditioning:
        first, last = pixels[:1], pixels[-1:]
        length, height, width, _ = pixels.shape
        prompt: list = [[None, {}]]
        if kind == FIRST:
            node, images = WanImageToVideo, {"start_image": first, "clip_vision_output": seen(first)}
        else:
            node, images = WanFirstLastFrameToVideo, {"start_image": first, "end_image": last}
            images |= {"clip_vision_start_image": seen(first), "clip_vision_end_image": seen(last)}
        positive, *_ = node.execute(prompt, prompt, vae, width, height, length, 1, **images).result
        values = positive[0][1]
        if VISION in values:
            values = {**values, VISION: values[VISION].penultimate_hidden_states}
        return {name: value.cpu().contiguous() for name, value in values.items()}

    return encode


def host_values(image: ImageConditioning) -> dict[str, Any]:
    """The entries that the host's node adds to a conditioning."""
    values: dict[str, Any] = {name: value.clone().float() for name, value in image.items()}
    if VISION in values:
        output = comfy.clip_vision.Output()
        output.penultimate_hidden_states = values[VISION]
        values[VISION] = output
    return values


def image_inputs(model: Any) -> ImageIn:
    """What a MODEL makes of an image conditioning before its transformer is called."""

    def inputs(image: ImageConditioning, x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        prompt = comfy.sampler_helpers.convert_cond([[None, host_values(image)]])
        (entry,) = comfy.samplers.encode_model_conds(model.model.extra_conds, prompt, x0, x0.device, "positive")
        arguments = {name: cond.cond for name, cond in entry["model_conds"].items()}
        return arguments.pop("c_concat"), arguments

    return inputs


def check_image(model: Any, parts: Collection[str]) -> None:
    """Refuse clips for text to video on an image-to-video model, and the other way round.

    Args:
        parts: the names in the clips' image conditioning; empty for text to video.

    Raises:
        TrainingError: says what to set.
    """
    extra, family = image_channels(model), require_family(model)
    if extra and family is not WAN:
        raise TrainingError(f"Only Wan can be trained as image to video. Load a text-to-video model of {family.title}.")
    if extra and not parts:
        raise TrainingError(
            f"The model makes videos from images (it takes {counted(extra, 'channel')} more), but the clips were encoded for text to "
            f"video. Set image_conditioning to {FIRST} in the dataset, or load a text-to-video model."
        )
    if parts and not extra:
        raise TrainingError(
            "The clips were encoded for image to video, but the model takes only text. "
            f"Set image_conditioning to {NO_IMAGE} in the dataset, or load an image-to-video model."
        )
    if parts and vision_width(model) and VISION not in parts:
        raise TrainingError(
            "The model sees its images through CLIP vision, but the clips were encoded without it. "
            "Connect clip_vision to the dataset, or set `clip_vision` in the settings file. Wan 2.1 uses clip_vision_h.safetensors."
        )


def check_image_values(model: Any, image: ImageConditioning, shape: tuple[int, ...]) -> None:
    """Refuse an image conditioning that does not fit the model.

    Args:
        shape: (channels, frames, height, width) of the clip's latent.

    Raises:
        TrainingError: another number of channels, or another CLIP vision model.
    """
    concat, _ = image_inputs(model)(image, torch.zeros(1, *shape))
    if concat.shape[1] != image_channels(model):
        raise TrainingError(
            f"The model takes {counted(image_channels(model), 'channel')} besides the video's, but images give {concat.shape[1]}. "
            "Load an image-to-video model of Wan 2.1 or Wan 2.2 A14B."
        )
    width = vision_width(model)
    if width and image[VISION].shape[-1] != width:
        raise TrainingError(
            f"The CLIP vision model gives tokens of width {image[VISION].shape[-1]}, but the model takes {width}. "
            "Encode the clips with clip_vision_h.safetensors."
        )


def vision_width(model: Any) -> int:
    """Values per token of the CLIP vision model that a MODEL needs; 0 if it needs none."""
    embedder = getattr(diffusion_model(model), "img_emb", None)
    return 0 if embedder is None else embedder.proj[1].in_features
