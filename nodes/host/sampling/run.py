"""Sampling in the host: a MODEL that switches, checks before a run, and the run."""

import base64
import io
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ....dcm_core.errors import DCMError, ScheduleError, check_choice, counted
from ....dcm_core.experts.modules import find_module
from ....dcm_core.text import given
from ..experts.attach import diffusion_model, model_family, with_boundary
from ..experts.halves import check_together
from ..report import server
from .schedules import sampler_names
from .setup import is_table, setup_of
from .switch import KEY as SIDES_KEY
from .switch import SidesGuider, two_sides, with_sides

# The animated preview of web/preview.js, and the most frames it has.
PREVIEW_EVENT, PREVIEW_FRAMES = "dcm.preview", 16


def prepare_model(
    model: Any, boundary: float = 0.0, detail_model: Any = None, cfg: float = 1.0, detail_cfg: float = 0.0
) -> tuple[Any, float | None]:
    """A MODEL that switches sides, and its boundary (None if nothing switches).

    Args:
        boundary: 0 uses the model's own.
        detail_cfg: 0 means the same as `cfg`.

    Raises:
        DCMError: two models or experts that do not belong together, or two sides for a model without a boundary.
    """
    if is_table(model):
        if boundary or detail_model is not None or detail_cfg:
            raise DCMError(
                "The model has an expert table, whose rows have models, cfgs and intervals of their own. Disconnect detail_model, and "
                "set detail_cfg and boundary to 0."
            )
        return model, None
    check_together(model, detail_model)
    setup = setup_of(model, detail_model)
    if not setup.two_sides:
        detail_model = None
    boundary = setup.boundary_for(boundary)
    model = with_boundary(model, boundary)
    low_cfg = other_cfg(cfg, detail_cfg)
    if detail_model is not None or low_cfg is not None:
        if boundary is None:
            raise DCMError(
                "boundary is 0, but this model has no default boundary. Set boundary to the sigma where the detail side begins."
            )
        low = None if detail_model is None else with_boundary(detail_model, boundary)
        model = with_sides(model, two_sides(boundary, low, low_cfg))
    return model, boundary


def other_cfg(cfg: float, detail_cfg: float) -> float | None:
    """The cfg of the detail side, None if it is the same; detail_cfg 0 means the same as cfg."""
    return detail_cfg if detail_cfg and detail_cfg != cfg else None


def make_guider(model: Any, positive: list, negative: list | None, cfg: float, detail_cfg: float = 0.0) -> Any:
    """A guider for a prepared MODEL.

    Raises:
        DCMError: a cfg other than 1 without a negative, or text embeddings of another model.
    """
    sides = model.get_attachment(SIDES_KEY)
    rows = {f"cfg of row {given(part.name)}": part.cfg for part in sides.parts} if sides and is_table(model) else {}
    cfgs = {"cfg": cfg, "detail_cfg": detail_cfg or None, **rows}
    guided = [f"{name} is {value:g}" for name, value in cfgs.items() if value not in (None, 1)]
    if negative is None and guided:
        raise DCMError(
            f"{', '.join(guided)}, but no negative is connected. "
            "Connect a negative prompt, or set cfg to 1, which DCM experts are distilled for."
        )
    check_text(model, positive, "positive")
    conds = {"positive": positive}
    if negative is not None:
        check_text(model, negative, "negative")
        conds["negative"] = negative
    guider = SidesGuider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    return guider


def check_text(model: Any, conditioning: list, name: str) -> None:
    """Refuse the output of another model's text encoder.

    Raises:
        DCMError: embeddings with a width that the model does not take.
    """
    family = model_family(model)
    if family is None:
        return
    expected = find_module(diffusion_model(model), family.text_module).in_features
    for embedding, _ in conditioning:
        if embedding is not None and embedding.shape[-1] != expected:
            raise DCMError(
                f"{name} has text embeddings of width {embedding.shape[-1]} (shape {tuple(embedding.shape)}), but {family.title} takes "
                f"{expected}. Load the text encoder with type `{family.clip_type}` in CLIPLoader / DualCLIPLoader."
            )


def check_latent(model: Any, samples: Tensor) -> None:
    """Refuse a latent of another model.

    Raises:
        DCMError: channels or dimensions that differ from the model's latent format.
    """
    expected = model.get_model_object("latent_format")
    dimensions = getattr(expected, "latent_dimensions", 2) + 2
    if samples.is_nested or (samples.ndim == dimensions and samples.shape[1] == expected.latent_channels):
        return
    raise DCMError(
        f"latent_image has shape {tuple(samples.shape)}, but the model takes {dimensions} dimensions with "
        f"{counted(expected.latent_channels, 'channel')}. Make it with the empty latent node of this model (Wan and HunyuanVideo: "
        "EmptyHunyuanLatentVideo)."
    )


def empty_noise_like(model: Any, latent: dict) -> Tensor:
    """The latent's samples, checked and prepared by the host (channels of an empty latent)."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *_downscale_ratio(latent))
    check_latent(model, samples)
    # older hosts make the noise and run the steps in the latent's own dtype
    half = not samples.is_nested and samples.dtype in (torch.float16, torch.bfloat16)
    return samples.float() if half else samples


def _downscale_ratio(latent: dict) -> tuple:
    """Arguments about an empty latent for newer hosts; none for older ones."""
    count = comfy.sample.fix_empty_latent_channels.__code__.co_argcount
    return tuple(latent.get(name) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")[: count - 2])


def memory_warning(guider: Any, latent: dict) -> str | None:
    """A warning if one step will not fit in device memory by the host's own estimate, else None.

    Weights are not counted, as the host offloads those that do not fit. What one step computes has to fit.
    """
    model = guider.model_patcher
    device = model.load_device
    samples = latent["samples"]
    if samples.is_nested:
        return None
    # an empty latent gets the model's channels
    shape = [samples.shape[0], model.get_model_object("latent_format").latent_channels, *samples.shape[2:]]
    _, needed = comfy.sampler_helpers.estimate_memory(model, shape, guider.original_conds)
    room = comfy.model_management.get_free_memory(device)
    if not comfy.model_management.is_device_cpu(device):
        loaded = [entry for entry in comfy.model_management.current_loaded_models if entry.model is not None]
        room += sum(entry.model_loaded_memory() for entry in loaded if entry.device == device)
    if needed <= room:
        return None
    return (
        f"Warning: a step needs about {needed / 1e9:.1f} GB in addition to the model's weights, but {device} has {room / 1e9:.1f} GB "
        "(ComfyUI's estimate). Use fewer frames or a smaller size."
    )


def choose_sampler(sampler: Any, name: str) -> Any:
    """The connected SAMPLER, else the host's sampler of this name.

    Raises:
        ScheduleError: an unknown name.
    """
    check_choice("sampler_name", name, sampler_names(), ScheduleError)
    return comfy.samplers.sampler_object(name) if sampler is None else sampler


def run(
    guider: Any,
    latent: dict,
    sampler: Any,
    sigmas: Tensor,
    seed: int,
    node_id: str | None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> tuple[dict, dict]:
    """One continuous trajectory over all sigmas.

    Args:
        callback: called in each step with (step, denoised, x, steps), in place of all bars and previews.

    Returns:
        The sampled latent and the last denoised estimate, each with the other entries of `latent`.
    """
    model = guider.model_patcher
    samples = empty_noise_like(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    last: dict[str, Tensor] = {}
    out = guider.sample(
        noise,
        samples,
        sampler or comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback or _callback(model, len(sigmas) - 1, node_id, last),
        disable_pbar=callback is not None or not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    result = {**latent, "samples": out.to(comfy.model_management.intermediate_device())}
    result.pop("downscale_ratio_spacial", None)
    result.pop("downscale_ratio_temporal", None)
    denoised = model.model.process_latent_out(last["denoised"].cpu()) if last else result["samples"]
    return result, {**result, "samples": denoised}


def _callback(model: Any, steps: int, node_id: str | None, last: dict[str, Tensor]) -> Any:
    """One progress bar for both sides, with the host's previews."""
    bar = comfy.utils.ProgressBar(steps, node_id=node_id)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
        last["denoised"] = denoised
        preview = previewer.decode_latent_to_preview_image("JPEG", denoised) if previewer else None
        bar.update_absolute(step + 1, total_steps, preview)
        if previewer and node_id is not None and server() is not None and denoised.ndim == 5 and denoised.shape[2] > 1:
            frames = preview_frames(previewer, denoised)
            server().send_sync(PREVIEW_EVENT, {"node": node_id, "frames": frames}, server().client_id)

    return callback


def preview_frames(previewer: Any, denoised: Tensor) -> list[str]:
    """Preview frames of a latent of shape (batch, channels, frames, height, width), as JPEG files in base64.

    The host's preview shows the first frame; these are spread over the first video of the batch.
    """
    count = min(denoised.shape[2], PREVIEW_FRAMES)
    frames = []
    for frame in torch.linspace(0, denoised.shape[2] - 1, count).round().int().tolist():
        kind, image, size = previewer.decode_latent_to_preview_image("JPEG", denoised[:1, :, frame : frame + 1])
        if size:
            image = ImageOps.contain(image, (size, size), Image.Resampling.BILINEAR)
        image.save(file := io.BytesIO(), format=kind, quality=85)
        frames.append(base64.b64encode(file.getvalue()).decode())
    return frames


def as_image(pixels: Any) -> Tensor:
    """A PIL image as the host's IMAGE, shape (1, height, width, 3), values 0 .. 1."""
    data = torch.frombuffer(bytearray(pixels.convert("RGB").tobytes()), dtype=torch.uint8)
    return rearrange(data, "(h w c) -> 1 h w c", h=pixels.height, c=3).float() / 255
