"""Several full models in one trajectory (Wan 2.2 A14B style), and a cfg for each part of it.

Two wrappers on one MODEL make every sampler node of the host switch: SAMPLER_SAMPLE opens and closes a run, PREDICT_NOISE
changes model and cfg. The host loads another model only when its part begins, and may then unload the one before.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....dcm_core.errors import DCMError
from ....dcm_core.routing import check_boundary
from ....dcm_core.table import Interval, Span
from ....dcm_core.text import given

KEY = "dcm_sides"
STATE = "dcm_run"


@dataclass(frozen=True)
class Part:
    """What is different in a part of a run.

    Attributes:
        name: the row or side, for messages.
        model: the MODEL that runs it; None for the guider's.
        cfg: None to keep the guider's.
        model_input: the input where the user connects the model, if not that of the row.
    """

    name: str
    span: Span | Interval
    model: Any = None
    cfg: float | None = None
    model_input: str = ""


@dataclass(frozen=True)
class Sides:
    """The parts of a run with another model or cfg. Everywhere else the guider's own model and cfg are used."""

    parts: tuple[Part, ...]

    @property
    def models(self) -> list[Any]:
        """The other models."""
        return list({id(part.model): part.model for part in self.parts if part.model is not None}.values())

    def with_models(self, change: Callable[[Any], Any]) -> "Sides":
        """The same with each model changed; None stands for the guider's."""
        changed = {id(model): change(model) for model in self.models}
        return Sides(tuple(replace(part, model=changed.get(id(part.model))) for part in self.parts))


def two_sides(boundary: float, detail_model: Any = None, detail_cfg: float | None = None) -> Sides:
    """A low-noise side with a model or a cfg of its own.

    Raises:
        ScheduleError: a boundary outside (0, 1).
    """
    return Sides(
        (Part("detail", Interval(check_boundary(boundary), -math.inf), detail_model, detail_cfg, "detail_model"),)
    )


def with_sides(model: Any, sides: Sides) -> Any:
    """A clone of MODEL that changes model and cfg during a run, in any sampler.

    Raises:
        DCMError: models that cannot share a trajectory.
    """
    for part in sides.parts:
        if part.model is not None:
            check_pair(model, part.model, part.model_input or f"the model of row {given(part.name)}")
    clone = model.clone()
    remove_sides(clone)
    clone.set_attachments(KEY, sides)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sample_run)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_part)
    return clone


def remove_sides(clone: Any) -> None:
    """Let a MODEL's own clone keep its model and cfg during a run."""
    clone.remove_attachments(KEY)
    for kind in (WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE):
        clone.remove_wrappers_with_key(kind, KEY)


def check_pair(model: Any, other: Any, name: str = "detail_model") -> None:
    """Check that both models use the same latents and noise levels.

    Args:
        name: what the user calls the other model.

    Raises:
        DCMError: different latent formats, channels, predictions or devices, or another model that switches models itself.
    """
    if other.get_attachment(KEY) is not None:
        raise DCMError(f"{name} already switches to a model of its own. Connect a plain model.")
    for trait, what in (
        ("latent format", lambda m: type(m.get_model_object("latent_format")).__name__),
        ("input channels", lambda m: m.get_model_object("latent_format").latent_channels),
        (
            "prediction",
            lambda m: ", ".join(base.__name__ for base in type(m.get_model_object("model_sampling")).__bases__),
        ),
    ):
        first, second = what(model), what(other)
        if first != second:
            raise DCMError(
                f"model and {name} cannot share one trajectory: their {trait} is {first} and {second}. "
                "Connect the high-noise and the low-noise half of the same model."
            )
    devices = [str(patcher.load_device) for patcher in (model, other)]
    if devices[0] != devices[1]:
        raise DCMError(
            f"model runs on {devices[0]} and {name} on {devices[1]}, but both must run on the same device. Load both for the same "
            "one; ComfyUI offloads the one that is not active."
        )


class Run:
    """One sampling run: which model and cfg are active, and what is needed to change them."""

    def __init__(
        self,
        guider: Any,
        sides: Sides,
        sigmas: Tensor,
        noise: Tensor,
        latent_image: Tensor,
        mask: Tensor | None,
        extra: dict,
    ):
        self.guider = guider
        self.noise, self.latent_image, self.mask, self.seed = noise, latent_image, mask, extra.get("seed")
        self.first_options = extra["model_options"]
        self.first = (guider.inner_model, guider.conds)
        self.cfg = getattr(guider, "cfg", None)
        self.intervals = intervals_of(sides.parts, sigmas, guider.model_patcher)
        self.other: Any = None  # the MODEL that is active instead of the guider's
        self.patcher: Any = None  # what the host has loaded of it
        self.other_options: dict | None = None
        self.hook_mode: Any = None
        self.loaded: list[Any] = []

    def enter(self, sigma: Tensor) -> None:
        """Make the model and cfg of a noise level () the active ones."""
        parts = [part for part, interval in self.intervals if bool(interval.covers(sigma))]
        model = next((part.model for part in parts if part.model is not None), None)
        if model is not self.other:
            self._leave() if self.other is not None else self.guider.model_patcher.cleanup()
            if model is None:
                self._return()
            else:
                self._load(model)
        if any(part.cfg is not None for part, _ in self.intervals):
            self.guider.cfg = next((part.cfg for part in parts if part.cfg is not None), self.cfg)

    def options(self, asked: dict) -> dict:
        """The options of the active model: its own, plus those that the sampler added."""
        if self.other_options is None:
            return asked
        merged = dict(self.other_options)
        for name in ("sampler_pre_cfg_function", "sampler_post_cfg_function"):
            known = self.first_options.get(name, [])
            added = [function for function in asked.get(name, []) if function not in known]
            if added:
                merged[name] = [*merged.get(name, []), *added]
        if asked.get("disable_cfg1_optimization"):
            merged["disable_cfg1_optimization"] = True
        return merged

    def _load(self, model: Any) -> None:
        """Let the host load another model, as `sample` and `outer_sample` do for the first one."""
        if getattr(model, "is_dynamic", bool)() and has_hooks(self.guider.original_conds):
            # hooks cannot change weights that newer hosts stream; the guider does the same with the first model
            patcher = model.get_non_dynamic_delegate()
        else:
            patcher = model
        self.other, self.patcher, self.hook_mode = model, patcher, patcher.hook_mode
        patcher.hook_mode = self.guider.model_patcher.hook_mode
        options = self.other_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        conds = {name: [cond.copy() for cond in conds] for name, conds in self.guider.original_conds.items()}
        comfy.samplers.preprocess_conds_hooks(conds)
        comfy.sampler_helpers.prepare_model_patcher(patcher, conds, options)
        comfy.samplers.filter_registered_hooks_on_conds(conds, options)
        inner_model, conds, self.loaded = comfy.sampler_helpers.prepare_sampling(
            patcher, self.noise.shape, conds, options
        )
        device = patcher.load_device
        comfy.samplers.cast_to_load_options(options, device=device, dtype=patcher.model_dtype())
        patcher.pre_run()
        conds = comfy.samplers.process_conds(
            inner_model, self.noise, conds, device, self.latent_image, self.mask, self.seed, **self._latent_shapes()
        )
        options.setdefault("transformer_options", {})["sample_sigmas"] = self.first_options["transformer_options"][
            "sample_sigmas"
        ]
        self.guider.inner_model, self.guider.conds = inner_model, conds

    def _latent_shapes(self) -> dict[str, list]:
        known = "latent_shapes" in inspect.signature(comfy.samplers.process_conds).parameters
        return {"latent_shapes": [self.latent_image.shape]} if known else {}

    def _return(self) -> None:
        """Back to the first model, which the host loads again."""
        patcher = self.guider.model_patcher
        comfy.sampler_helpers.prepare_sampling(patcher, self.noise.shape, self.guider.conds, self.guider.model_options)
        patcher.pre_run()
        for conds in self.guider.conds.values():
            comfy.samplers.pre_run_control(self.guider.inner_model, conds)

    def _leave(self) -> None:
        """Remove the other model, however far `_load` came."""
        patcher = self.patcher
        comfy.sampler_helpers.cleanup_models(self.guider.conds, self.loaded)
        patcher.cleanup()
        comfy.samplers.cast_to_load_options(self.other_options, device=patcher.offload_device)
        patcher.restore_hook_patches()
        patcher.hook_mode = self.hook_mode
        self.guider.inner_model, self.guider.conds = self.first
        self.loaded, self.other, self.patcher, self.other_options = [], None, None, None

    def close(self) -> None:
        """Leave the guider as it was found."""
        if self.other is not None:
            self._leave()
        if self.cfg is not None:
            self.guider.cfg = self.cfg


def intervals_of(parts: Iterable[Part], sigmas: Tensor, model: Any) -> list[tuple[Part, Interval]]:
    """The noise levels of each part in a run of MODEL.

    Raises:
        DCMError: two parts with different models, or cfgs, for one step; names both.
    """
    sigmas = sigmas.cpu()
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    found = [(part, part.span.interval(sigmas, to_sigma)) for part in parts]
    for attribute, what in (("model", "a full model"), ("cfg", "a cfg")):
        for index, (first, interval) in enumerate(found):
            for second, other in found[index + 1 :]:
                values = getattr(first, attribute), getattr(second, attribute)
                if None in values or values[0] == values[1]:
                    continue
                if bool((interval.covers(sigmas[:-1]) & other.covers(sigmas[:-1])).any()):
                    raise DCMError(
                        f"Rows {given(first.name)} and {given(second.name)} both have {what} for the same step. Only one can be used. "
                        "Change the interval of one of them."
                    )
    return found


class SidesGuider(comfy.samplers.CFGGuider):
    """The host's guider, except that a first model without steps is not loaded (the host would load it before any step)."""

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        sides = self.model_patcher.get_attachment(KEY)
        first = None if sides is None else self._without_first(sides, sigmas)
        if first is None:
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        alone = comfy.samplers.CFGGuider(
            with_sides(first, sides.with_models(lambda model: None if model is first else model))
        )
        alone.inner_set_conds({name: [[None, cond] for cond in conds] for name, conds in self.original_conds.items()})
        alone.set_cfg(self.cfg)
        return alone.sample(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _without_first(self, sides: Sides, sigmas: Tensor) -> Any:
        """The model that runs the first step, if the guider's own runs none; else None."""
        found = intervals_of(sides.parts, sigmas, self.model_patcher)
        covered = [(part.model, interval.covers(sigmas.cpu())) for part, interval in found if part.model is not None]
        if not covered or not bool(torch.stack([steps for _, steps in covered]).any(0).all()):
            return None
        return next(model for model, steps in covered if bool(steps[0]))


def has_hooks(conds: dict[str, list[dict]]) -> bool:
    """Whether a conditioning, or a ControlNet on it, changes weights while it is used."""
    return any(
        "hooks" in cond or ("control" in cond and len(cond["control"].get_extra_hooks()) > 0)
        for part in conds.values()
        for cond in part
    )


def sample_run(
    executor: Callable,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict,
    callback: Any,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """SAMPLER_SAMPLE wrapper: one run, cleaned up even after errors."""
    sides = guider.model_patcher.get_attachment(KEY)
    run = Run(guider, sides, sigmas, noise, latent_image, denoise_mask, extra_args)
    setattr(guider, STATE, run)
    try:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        delattr(guider, STATE)
        run.close()


def predict_part(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    model_options: dict | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """PREDICT_NOISE wrapper: predict with the model and cfg of the sigma `timestep` (batch,), the highest of the batch."""
    run: Run | None = getattr(executor.class_obj, STATE, None)
    if run is None:
        raise DCMError(
            "This sampler node calls the model outside ComfyUI's sampling run, so DCM cannot switch models or cfg during the run. "
            "Use DCM Sampler, KSampler or SamplerCustomAdvanced."
        )
    run.enter(timestep.max().cpu())
    return executor(x, timestep, run.options(model_options or {}), seed, **kwargs)
