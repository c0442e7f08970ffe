"""What the sampling nodes ask of the host: schedules of a MODEL, checks before a run, and the run."""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...dcm_core.adapters import find_module
from ...dcm_core.errors import DCMError, ScheduleError, counted
from ...dcm_core.families import FAMILIES, WAN, Family
from ...dcm_core.routing import check_boundary, plan_steps
from ...dcm_core.schedule import check_sigmas, generic_sigmas, last_part, sigmas_from_timesteps
from .attach import attached_experts, diffusion_model, model_family, with_boundary
from .switch import KEY as SIDES_KEY
from .switch import Sides, SidesGuider, with_sides

AUTO, GENERIC = "auto", "generic"
PRESETS = {family.preset.title: family.preset for family in FAMILIES.values()}

# Wan 2.2 A14B: sigma where the low-noise model begins, by whether the model takes an image.
WAN22_BOUNDARY = {False: 0.875, True: 0.9}


def choose_sigmas(schedule: str, steps: int, shift: float, denoise: float, model: Any = None) -> Tensor:
    """The sigmas of a schedule by name.

    auto is the attached experts' own, else the family's preset, else (two full models, other families) the generic one.

    Raises:
        ScheduleError: settings that give no schedule.
    """
    if schedule not in (AUTO, GENERIC, *PRESETS):
        raise ScheduleError(f"The schedule is {schedule!r}; choose one of {', '.join((AUTO, *PRESETS, GENERIC))}.")
    if schedule == AUTO and model is None:
        raise ScheduleError("The schedule is auto, but no model is connected to read it from. Connect the model, or choose a schedule.")
    if schedule != AUTO:
        return sigmas_by_name(schedule, steps, shift, denoise)
    facts, sides = attached_experts(model), model.get_attachment(SIDES_KEY)
    two_models = sides is not None and are_two(model, sides.detail_model)
    return sigmas_by_name(AUTO, steps, shift, denoise, facts and facts.timesteps, model_family(model), two_models)


def sigmas_by_name(
    schedule: str, steps: int, shift: float, denoise: float, timesteps: Sequence[float] | None = None, family: Family | None = None,
    two_models: bool = False,
) -> Tensor:
    """The sigmas of a schedule; what auto depends on is told: the experts' timesteps, and what the model is."""
    if schedule in PRESETS:
        sigmas = PRESETS[schedule].sigmas
    elif schedule == AUTO and timesteps:
        sigmas = sigmas_from_timesteps(timesteps)
    elif schedule == AUTO and family is not None and not two_models:
        sigmas = family.preset.sigmas
    else:
        sigmas = generic_sigmas(steps, shift)
    return last_part(sigmas, denoise)


def are_two(model: Any, detail_model: Any) -> bool:
    """Whether a second MODEL has weights of its own, and is not the first one with other LoRAs."""
    if detail_model is None:
        return False
    # newer hosts' clones for torch.compile have a copy of the base's weights, and know whose
    first, second = (getattr(each, "clone_base_uuid", each.model) for each in (model, detail_model))
    return first != second


def usual_boundary(family: Family | None, two_models: bool, takes_image: bool | None) -> float | None:
    """The sigma where the detail side of a kind of model begins, None if it has none or `takes_image` is not known."""
    if two_models and family is WAN:
        return WAN22_BOUNDARY.get(takes_image)
    return family.preset.boundary if family is not None else None


def choose_boundary(model: Any, boundary: float, two_models: bool) -> float | None:
    """The sigma where the detail side begins: as given, else the experts' own, else the model's usual one.

    Returns:
        None for a model whose kind has none.
    """
    if boundary:
        return check_boundary(boundary)
    facts, family = attached_experts(model), model_family(model)
    if facts is not None and facts.own_boundary:
        return facts.boundary
    takes_image = getattr(diffusion_model(model), "in_dim", 0) > model.get_model_object("latent_format").latent_channels
    return usual_boundary(family, two_models, takes_image)


def prepare_model(
    model: Any, boundary: float = 0.0, detail_model: Any = None, cfg: float = 1.0, detail_cfg: float = 0.0
) -> tuple[Any, float | None]:
    """A MODEL that switches as asked, and its boundary (None if nothing switches at one).

    Args:
        boundary: 0 for the model's own.
        detail_cfg: 0 for the same as `cfg`.

    Raises:
        DCMError: two models that do not fit together; two sides asked of a model without a boundary.
    """
    sigma = choose_boundary(model, boundary, are_two(model, detail_model))
    model = with_boundary(model, sigma)
    other_cfg = detail_cfg if detail_cfg and detail_cfg != cfg else None
    if detail_model is not None or other_cfg is not None:
        if sigma is None:
            raise DCMError("This model has no usual boundary, and boundary is 0. Set boundary to the sigma where the sides change.")
        low = None if detail_model is None else with_boundary(detail_model, sigma)
        model = with_sides(model, Sides(sigma, low, other_cfg))
    return model, sigma


def make_guider(model: Any, positive: list, negative: list | None, cfg: float, detail_cfg: float = 0.0) -> Any:
    """A guider over a prepared MODEL.

    Raises:
        DCMError: a cfg other than 1 without a negative, or text embeddings of another model.
    """
    if negative is None and (cfg != 1 or (detail_cfg or 1) != 1):
        raise DCMError(
            f"cfg is {cfg:g}{f' and detail_cfg {detail_cfg:g}' if detail_cfg else ''}, but no negative is connected. "
            "DCM samples at cfg 1; for any other cfg connect a negative prompt."
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
        DCMError: embeddings of another width than the model takes.
    """
    family = model_family(model)
    if family is None:
        return
    expected = find_module(diffusion_model(model), family.text_module).in_features
    for embedding, _ in conditioning:
        if embedding is not None and embedding.shape[-1] != expected:
            raise DCMError(
                f"{name} has text embeddings of width {embedding.shape[-1]} (shape {tuple(embedding.shape)}); {family.title} takes "
                f"{expected}. Load the text encoder with type `{family.clip_type}` in CLIPLoader / DualCLIPLoader."
            )


def check_latent(model: Any, samples: Tensor) -> None:
    """Refuse a latent of another model.

    Raises:
        DCMError: other channels or dimensions than the model's latent format.
    """
    expected = model.get_model_object("latent_format")
    dimensions = getattr(expected, "latent_dimensions", 2) + 2
    if samples.is_nested or (samples.ndim == dimensions and samples.shape[1] == expected.latent_channels):
        return
    raise DCMError(
        f"latent_image has shape {tuple(samples.shape)}; the model takes {dimensions} dimensions with "
        f"{counted(expected.latent_channels, 'channel')}. Make it with the empty latent node of this model (Wan and HunyuanVideo: "
        "EmptyHunyuanLatentVideo)."
    )


def has_sides(model: Any) -> bool:
    """Whether anything changes at a boundary: experts are attached, or a prepared MODEL has two sides."""
    return attached_experts(model) is not None or model.get_attachment(SIDES_KEY) is not None


def describe_run(model: Any, sigmas: Tensor, boundary: float | None) -> str:
    """The plan in words: `step 1-3 semantic, 4-6 detail, boundary 0.979`."""
    check_sigmas(sigmas)
    if boundary is None or not has_sides(model):
        return f"{counted(len(sigmas) - 1, 'step')}, no experts attached"
    plan = plan_steps(sigmas, boundary)
    alone = "" if plan.semantic and plan.detail else f" (the {'detail' if plan.semantic else 'semantic'} side has no step)"
    return f"{plan}{alone}"


def empty_noise_like(model: Any, latent: dict) -> Tensor:
    """The latent's samples as the host prepares them (channels of an empty latent), checked."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *_downscale_ratio(latent))
    check_latent(model, samples)
    return samples


def _downscale_ratio(latent: dict) -> tuple:
    """What newer hosts want to know of an empty latent, nothing for older ones."""
    count = comfy.sample.fix_empty_latent_channels.__code__.co_argcount
    return tuple(latent.get(name) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")[: count - 2])


def run(guider: Any, latent: dict, sampler: Any, sigmas: Tensor, seed: int, node_id: str | None) -> tuple[dict, dict]:
    """One continuous trajectory over all sigmas.

    Returns:
        The sampled latent and the last denoised estimate, each with the given latent's other entries.
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
        callback=_callback(model, len(sigmas) - 1, node_id, last),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    result = {**latent, "samples": out.to(comfy.model_management.intermediate_device())}
    result.pop("downscale_ratio_spacial", None)
    result.pop("downscale_ratio_temporal", None)
    denoised = model.model.process_latent_out(last["denoised"].cpu()) if last else result["samples"]
    return result, {**result, "samples": denoised}


def _callback(model: Any, steps: int, node_id: str | None, last: dict[str, Tensor]) -> Any:
    """One progress bar over both sides, with the host's previews."""
    bar = comfy.utils.ProgressBar(steps, node_id=node_id)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
        last["denoised"] = denoised
        preview = previewer.decode_latent_to_preview_image("JPEG", denoised) if previewer else None
        bar.update_absolute(step + 1, total_steps, preview)

    return callback


def as_image(pixels: Any) -> Tensor:
    """A PIL image as the host's IMAGE, shape (1, height, width, 3), values 0 .. 1."""
    data = torch.frombuffer(bytearray(pixels.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.reshape(1, pixels.height, pixels.width, 3).float() / 255
