"""Two full models in one trajectory (Wan 2.2 A14B style), and a cfg for each side.

Two wrappers on one MODEL make every sampler node of the host switch: SAMPLER_SAMPLE opens and closes a run, PREDICT_NOISE
changes sides at the boundary. The host loads the second model only when its side begins, and may then unload the first.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....dcm_core.errors import DCMError
from ....dcm_core.routing import Side, check_boundary, is_detail

KEY = "dcm_sides"
STATE = "dcm_run"


@dataclass(frozen=True)
class Sides:
    """What changes at the boundary.

    Attributes:
        detail_model: the MODEL of the low-noise side; None if only the cfg changes.
        detail_cfg: cfg of the low-noise side; None to keep the guider's.
    """

    boundary: float
    detail_model: Any = None
    detail_cfg: float | None = None


def with_sides(model: Any, sides: Sides) -> Any:
    """A clone of MODEL that changes sides at the boundary, in any sampler.

    Raises:
        DCMError: two models that cannot share a trajectory, or a boundary outside (0, 1).
    """
    check_boundary(sides.boundary)
    if sides.detail_model is not None:
        check_pair(model, sides.detail_model)
    clone = model.clone()
    clone.set_attachments(KEY, sides)
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, sample_run), (WrappersMP.PREDICT_NOISE, predict_side)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def check_pair(model: Any, detail_model: Any) -> None:
    """Check that both models use the same latents and noise levels.

    Raises:
        DCMError: different latent formats, channels, predictions or devices, or a detail_model that has one itself.
    """
    if detail_model.get_attachment(KEY) is not None:
        raise DCMError("detail_model already has a detail model of its own. Connect the plain low-noise model.")
    for name, what in (
        ("latent format", lambda m: type(m.get_model_object("latent_format")).__name__),
        ("input channels", lambda m: m.get_model_object("latent_format").latent_channels),
        (
            "prediction",
            lambda m: ", ".join(base.__name__ for base in type(m.get_model_object("model_sampling")).__bases__),
        ),
    ):
        first, second = what(model), what(detail_model)
        if first != second:
            raise DCMError(
                f"model and detail_model cannot share one trajectory: their {name} is {first} and {second}. "
                "Connect the high-noise and the low-noise half of the same model."
            )
    devices = [str(patcher.load_device) for patcher in (model, detail_model)]
    if devices[0] != devices[1]:
        raise DCMError(
            f"model runs on {devices[0]} and detail_model on {devices[1]}, but both must run on the same device. Load both for the same "
            "one; ComfyUI offloads the one that is not active."
        )


class Run:
    """One sampling run: which side is active, and what is needed to change sides."""

    def __init__(
        self, guider: Any, sides: Sides, noise: Tensor, latent_image: Tensor, mask: Tensor | None, extra: dict
    ):
        self.guider, self.sides = guider, sides
        self.noise, self.latent_image, self.mask, self.seed = noise, latent_image, mask, extra.get("seed")
        self.first_options = extra["model_options"]
        self.first = (guider.inner_model, guider.conds)
        self.cfg = getattr(guider, "cfg", None)
        self.side: Side = "semantic"
        self.detail_patcher = sides.detail_model
        self.detail_options: dict | None = None
        self.hook_mode: Any = None
        self.loaded: list[Any] = []

    def enter(self, side: Side) -> None:
        """Make `side` the active one."""
        if side == self.side:
            return
        self.side = side
        if self.sides.detail_model is not None:
            self._load() if side == "detail" else self._return()
        if self.sides.detail_cfg is not None:
            self.guider.cfg = self.sides.detail_cfg if side == "detail" else self.cfg

    def options(self, given: dict) -> dict:
        """The model options of the active side: its own, plus those that the sampler added."""
        if self.side == "semantic" or self.detail_options is None:
            return given
        merged = dict(self.detail_options)
        for name in ("sampler_pre_cfg_function", "sampler_post_cfg_function"):
            known = self.first_options.get(name, [])
            added = [function for function in given.get(name, []) if function not in known]
            if added:
                merged[name] = [*merged.get(name, []), *added]
        if given.get("disable_cfg1_optimization"):
            merged["disable_cfg1_optimization"] = True
        return merged

    def _load(self) -> None:
        """Let the host load the detail model, as `sample` and `outer_sample` do for the first model."""
        if getattr(self.detail_patcher, "is_dynamic", bool)() and has_hooks(self.guider.original_conds):
            # hooks cannot change weights that newer hosts stream; the guider does the same with the first model
            self.detail_patcher = self.detail_patcher.get_non_dynamic_delegate()
        patcher = self.detail_patcher
        self.guider.model_patcher.cleanup()
        self.hook_mode = patcher.hook_mode
        patcher.hook_mode = self.guider.model_patcher.hook_mode
        options = self.detail_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
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
        """Back to the first model, which the host loads again: the sampler has raised sigma."""
        self._leave()
        patcher = self.guider.model_patcher
        comfy.sampler_helpers.prepare_sampling(patcher, self.noise.shape, self.guider.conds, self.guider.model_options)
        patcher.pre_run()
        for conds in self.guider.conds.values():
            comfy.samplers.pre_run_control(self.guider.inner_model, conds)

    def _leave(self) -> None:
        """Remove the detail model, however far `_load` came."""
        patcher = self.detail_patcher
        comfy.sampler_helpers.cleanup_models(self.guider.conds, self.loaded)
        patcher.cleanup()
        comfy.samplers.cast_to_load_options(self.detail_options, device=patcher.offload_device)
        patcher.restore_hook_patches()
        patcher.hook_mode = self.hook_mode
        self.guider.inner_model, self.guider.conds = self.first
        self.loaded, self.detail_options = [], None

    def close(self) -> None:
        """Leave the guider as it was found."""
        if self.side == "detail" and self.sides.detail_model is not None:
            self._leave()
        if self.cfg is not None:
            self.guider.cfg = self.cfg


class SidesGuider(comfy.samplers.CFGGuider):
    """The host's guider, except that a first model without steps is not loaded (the host would load it before any step)."""

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        sides = self.model_patcher.get_attachment(KEY)
        if sides is None or sides.detail_model is None or not bool(is_detail(sigmas, sides.boundary).all()):
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        alone = comfy.samplers.CFGGuider(sides.detail_model)
        alone.inner_set_conds({name: [[None, cond] for cond in conds] for name, conds in self.original_conds.items()})
        alone.set_cfg(self.cfg if sides.detail_cfg is None else sides.detail_cfg)
        return alone.sample(noise, latent_image, sampler, sigmas, *args, **kwargs)


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
    run = Run(guider, sides, noise, latent_image, denoise_mask, extra_args)
    setattr(guider, STATE, run)
    try:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        delattr(guider, STATE)
        run.close()


def predict_side(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    model_options: dict | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """PREDICT_NOISE wrapper: predict with the side of the sigma `timestep` (batch,)."""
    run: Run | None = getattr(executor.class_obj, STATE, None)
    if run is None:
        raise DCMError(
            "This sampler node calls the model outside ComfyUI's sampling run, so DCM cannot switch to detail_model or detail_cfg. "
            "Use DCM Sampler, KSampler or SamplerCustomAdvanced."
        )
    run.enter("detail" if bool(is_detail(timestep, run.sides.boundary).all()) else "semantic")
    return executor(x, timestep, run.options(model_options or {}), seed, **kwargs)
