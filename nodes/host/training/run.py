"""Train an expert on the host's model."""

import logging
import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ....dcm_core.distill.backbone import shard_base
from ....dcm_core.distill.batches import generator_of
from ....dcm_core.distill.checkpoint_file import CLIPS, DATA, PROCESSES
from ....dcm_core.distill.checkpoints import check_resumable, locked
from ....dcm_core.distill.config import TrainingConfig, TrainingError
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.learner import import_adamw8bit
from ....dcm_core.distill.method.discriminator import discriminator_size
from ....dcm_core.distill.parallel import join
from ....dcm_core.distill.student import new_detail, new_semantic
from ....dcm_core.distill.trainer import Result, Trainer
from ....dcm_core.distill.watcher import Quiet
from ....dcm_core.errors import ScheduleError, counted
from ....dcm_core.experts.expert import Expert, expert_id, size_of, write_expert
from ....dcm_core.families import Family
from ....dcm_core.inspection.loss_plot import plot_losses
from ....dcm_core.pair import Fingerprint
from ....dcm_core.routing import SAME_BOUNDARY, Side, own_boundary, split_sigmas
from ....dcm_core.schedule import sigmas_from_timesteps
from ....dcm_core.text import LOGGER
from ..compat import gradients
from ..experts.attach import diffusion_model, module_shapes, require_family
from ..experts.expert_files import load_expert, trained_expert
from ..experts.route import attached_experts
from ..folders import LORAS, NONE, new_file, path_of, run_folder
from ..sampling.run import as_image
from .base import (
    check_data,
    check_fits,
    clear_device,
    differentiable,
    hold,
    interrupted_at_exit,
    make_backbone,
    make_room,
    own_weights,
    training_base,
)
from .encoders import weights_id
from .image import image_inputs
from .pair import bases_of, checked_pair, known_bases, pair_boundary
from .show import Show, in_words, with_experts

logger = logging.getLogger(LOGGER)

FLOAT32 = 4


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        plots: a picture of each loss, (losses, height, width, 3).
        notes: see `notes_on`.
    """

    model: Any
    result: Result
    file: Path
    plots: Tensor
    notes: list[str]

    @property
    def expert(self) -> Expert:
        return self.result.expert

    def __str__(self) -> str:
        last = self.result.history[-1]
        steps = f"{counted(int(last['step']), 'step')} in all, {self.result.seconds:.0f} s in this run"
        lines = [
            str(self.expert),
            *self.notes,
            self.result.skipped,
            self.result.resumed,
            f"{steps}: {in_words(last)}",
            f"Saved to {self.file}",
        ]
        return "\n".join(filter(None, lines))


def train_and_save(
    model: Any,
    data: Dataset,
    config: TrainingConfig,
    name: str,
    continue_from: str = NONE,
    semantic_lora: str = NONE,
    semantic_expert: Expert | None = None,
    *,
    other_model: Any = None,
    vae: Any = None,
    node_id: str | None = None,
) -> Run:
    """Train under a name: checkpoints in the output folder, the expert among the host's LoRAs.

    Args:
        other_model: the low-noise or the high-noise model, if MODEL is the other one of the two.

    Raises:
        DCMError: anything that does not fit, before any training.
    """
    folder = run_folder(name)
    file = new_file(LORAS, f"dcm/{name.strip()}", overwrite=True)
    for given, chosen in (("continue_from", continue_from), ("semantic_lora", semantic_lora)):
        if chosen != NONE:
            check_not_output(f"{given} is {chosen}", path_of(LORAS, chosen), file)
    semantic = trained_expert(semantic_expert, "semantic", model) or load_expert(
        semantic_lora, "semantic", model, "semantic_lora"
    )
    start = load_expert(continue_from, config.side, model, "continue_from")
    bases = None if other_model is None else bases_of(model, other_model, config.side)
    result = train_expert(
        model, data, config, folder, start=start, semantic=semantic, bases=bases, vae=vae, node_id=node_id
    )
    save_expert(file, result.expert, model)
    plots = torch.cat([as_image(plot) for plot in plots_of(result).values()])
    under = None if result.expert.pair else semantic
    notes = notes_on(config, semantic, result.expert.pair)
    return Run(with_experts(model, result.expert, under), result, file, plots, notes)


def plots_of(result: Result) -> dict[str, Image.Image]:
    """A plot of each loss, by its name."""
    return {term: plot_losses(result.history, term) for term in result.history[-1] if term != "step"}


def train_expert(
    model: Any,
    data: Dataset,
    config: TrainingConfig,
    folder: Path,
    *,
    start: Expert | None = None,
    semantic: Expert | None = None,
    bases: Mapping[Side, Fingerprint] | None = None,
    vae: Any = None,
    node_id: str | None = None,
    handover: Path | None = None,
    shard: bool = True,
    trial: bool = False,
) -> Result | None:
    """Train, or resume from the checkpoints in `folder`. MODEL is unchanged afterwards, unless it was divided.

    Args:
        start: an expert to start from, instead of one that changes nothing.
        semantic: the semantic expert under a detail expert, or that of the other one of two models.
        bases: the two models of which MODEL is one; None takes those of `semantic` or `start`.
        handover: see `Show`.
        shard: whether several processes divide base, experts and optimiser among them, so that each keeps a part.
        trial: only find out whether the run fits into memory.

    Raises:
        DCMError: data, settings or a checkpoint that does not fit.
    """
    processes = join(model.load_device)
    processes = replace(processes, sharded=processes.count > 1 and shard)
    with processes.agreed():
        check_optimizer(config, processes.sharded)
        family = require_family(model)
        bases = bases or known_bases(model, config.side, (semantic, start))
        boundary = shared_boundary(config, start, semantic)
        config = config.for_family(family, boundary or (bases and pair_boundary(model, family, config)))
        check_form(model, config, family, start, semantic)
        pair = bases and checked_pair(bases, config, family, semantic)
        if pair is not None:
            # it works on the other model, above the boundary
            semantic = None
        check_data(model, data, vae)
        if config.caption_dropout and data.empty() is None:
            raise TrainingError(
                f"caption_dropout is {config.caption_dropout:g}, but the dataset file has no empty text to replace captions with. "
                "Save it again from DCM Video Dataset, or set caption_dropout to 0."
            )
        # raises if held_out is too large
        data.split(config.held_out, config.seed)
        base = training_base(model)
        device = base.load_device
        identity = identity_of(base, data, start, semantic, processes.count)
    processes.check_same({**identity, "settings": config.to_json()})
    notes = notes_on(config, semantic, pair)
    for note in notes if processes.first and not trial else ():
        logger.warning(note)
    with (
        processes.agreed() as agree,
        # the others take their checkpoint from the first, and write none
        locked(folder) if processes.first and not trial else nullcontext(),
        torch.inference_mode(False),
        torch.enable_grad(),
        gradients(),
        differentiable(base),
    ):
        if processes.first:
            check_resumable(folder, config, identity)
        clear_device(base)
        if processes.sharded:
            # complete in system memory; each process keeps a part of it on its device
            base.load_device = base.offload_device
        # first: removes what other clones have patched into the shared model
        hold(base, 0)
        backbone = make_backbone(base, family, config)
        beside = discriminator_size(backbone, config) + (FLOAT32 * size_of(semantic) if semantic else 0)
        if config.rank == 0:
            # as large as the model, so refused before it is made
            model_size = FLOAT32 * sum(map(math.prod, module_shapes(base).values()))
            check_fits(base, config, model_size, beside, device, processes)
        expert = replace(first_expert(base, family, config, start, semantic), pair=pair)
        present = check_fits(base, config, FLOAT32 * size_of(expert), beside, device, processes)
        if processes.sharded:
            # from here on, all wait for each other
            agree()
            shard_base(backbone.module, family, device)
        else:
            hold(base, present)
        show = Show(
            base, semantic, config, data, folder, node_id, lambda: hold(base, memory.step), vae, notes, handover
        )
        trainer = Trainer(
            backbone,
            data,
            config,
            expert,
            folder,
            device,
            semantic=semantic,
            # cloned: tensors from inference mode cannot take part in a backward pass
            latent_in=lambda latent: base.model.process_latent_in(latent.clone().float()),
            image_in=image_inputs(base),
            identity=identity,
            watcher=show if processes.first else Quiet(),
            processes=processes,
        )
        # the trainer keeps its own copy
        del expert, start
        memory = make_room(trainer, base, config, node_id)
        agree()
        if trial:
            return None
        with interrupted_at_exit(), closing(show.log):
            return trainer.run()


def check_optimizer(config: TrainingConfig, sharded: bool) -> None:
    """Refuse an optimiser that is not installed. Also 8-bit moments of divided tensors: their blocks would not fit the parts.

    Raises:
        TrainingError: says what to change.
    """
    if config.optimizer != "adamw8bit":
        return
    import_adamw8bit()
    if sharded:
        raise TrainingError(
            "optimizer is adamw8bit, which does not work with tensors that are divided among processes. Set optimizer to adamw, or "
            '"shard" to false in the settings file.'
        )


def identity_of(
    base: Any, data: Dataset, start: Expert | None, semantic: Expert | None, processes: int
) -> dict[str, str]:
    """What a resumed run is compared with, in addition to its settings: see `Checkpoint`."""
    names = {DATA: data.fingerprint, CLIPS: " ".join(data.clip_ids), "model": weights_id(base)}
    if processes > 1:
        names[PROCESSES] = str(processes)
    return names | {
        name: expert_id(expert) for name, expert in (("start", start), ("semantic expert", semantic)) if expert
    }


def notes_on(config: TrainingConfig, semantic: Expert | None, pair: Any) -> list[str]:
    """What may not be what the user wants, but is allowed."""
    if config.side == "detail" and semantic is None and pair is None:
        return [
            "There is no semantic expert, so the detail expert is trained on the base model alone. If you use both experts "
            "together, choose the semantic expert and start again."
        ]
    return []


def shared_boundary(config: TrainingConfig, start: Expert | None, semantic: Expert | None) -> float | None:
    """The boundary of the existing experts, which must be the same.

    Raises:
        DCMError: experts for different boundaries.
    """
    if (
        semantic is not None
        and semantic.boundary
        and config.boundary
        and abs(semantic.boundary - config.boundary) > SAME_BOUNDARY
    ):
        raise TrainingError(
            f"boundary is {config.boundary:g}, but the semantic expert was made for {semantic.boundary:g}, and both experts need the same. "
            "Set boundary to 0 to use the semantic expert's."
        )
    return (
        None if config.boundary else own_boundary(expert.boundary for expert in (semantic, start) if expert is not None)
    )


def check_form(
    model: Any, config: TrainingConfig, family: Family, start: Expert | None, semantic: Expert | None
) -> None:
    """Refuse experts that do not fit, settings that would have no effect, and settings whose expert would never run.

    Raises:
        TrainingError: an expert of another family, or a semantic expert that is only attached to MODEL. Also a rank or alpha that
            differs from the expert to start from, or a schedule without steps on one side of the boundary.
    """
    for given in (start, semantic):
        if given is not None and given.family != family.name:
            raise TrainingError(
                f"The expert is for {given.family}, but the model is {family.title}. Choose an expert made for this model."
            )
    attached = attached_experts(model)
    if attached is not None and attached.boundary is None:
        raise TrainingError(
            "model has an expert table attached, and training would remove it. Connect the model from before DCM Attach Table."
        )
    if attached is not None and "semantic" in attached.experts and config.side == "detail" and semantic is None:
        raise TrainingError(
            "model has a semantic expert attached. Training removes it, so the detail expert would be trained for the base alone. "
            "Connect that expert to semantic_expert or choose its file as semantic_lora, and connect the base to model."
        )
    if start is not None and len(start.ranks) < 2:
        rank = max(start.ranks, default=0)
        scale = next((update.scale for updates in start.low_rank.values() for update in updates), 0.0)
        if rank != config.rank or (rank and not math.isclose(scale, config.alpha / rank, rel_tol=1e-3)):
            has = (
                f"has rank {rank} and alpha {rank * scale:g}" if rank else "is not a LoRA: all its weights were trained"
            )
            wanted = f"rank to {rank}" + (f" and alpha to {rank * scale:g}" if rank else "")
            raise TrainingError(
                f"rank is {config.rank} and alpha is {config.alpha:g}, but the expert in continue_from {has}. Set {wanted}."
            )
    if not config.shared:
        try:
            split_sigmas(sigmas_from_timesteps(config.timesteps(family)), config.boundary)
        except ScheduleError as error:
            raise TrainingError(
                f"{error} The steps follow from shift, sample_steps and boundary, the same for both experts."
            ) from error


def check_not_output(what: str, given: Path, file: Path) -> None:
    """Refuse an input file (`what`: its setting and value) that the run would overwrite.

    Raises:
        TrainingError: the same file.
    """
    if given.resolve() == file.resolve():
        raise TrainingError(f"{what}, which is the file that this run writes. Choose another name for the run.")


def first_expert(
    model: Any, family: Family, config: TrainingConfig, start: Expert | None, semantic: Expert | None
) -> Expert:
    """The expert that training starts from: `start`, or one that changes nothing yet."""
    modules = dict(diffusion_model(model).named_modules())
    generator = generator_of(config.seed, 0, 0)
    if config.side == "semantic":
        expert = start or new_semantic(family, modules, config.rank, config.alpha, generator, own_weights(model))
    elif start is not None and start.replaced:
        expert = start
    else:
        expert = new_detail(
            family, modules, config.rank, config.alpha, generator, semantic, own_weights(model), config.every_linear
        )
        # a plain LoRA has no embedders and head
        expert = expert if start is None else replace(start, replaced=expert.replaced)
    return replace(expert, role=config.side, boundary=config.boundary, timesteps=config.timesteps(family))


def save_expert(path: Path, expert: Expert, model: Any) -> None:
    """Write the expert as a LoRA file that the host and DCM Attach Experts can load.

    The LoRA is stored in bfloat16. Replaced tensors are stored in the base's own dtype, as they differ little from the base.
    """
    own = model.model_dtype() if model.model_dtype() in (torch.float32, torch.float16) else torch.bfloat16
    write_expert(path, expert, module_shapes(model), torch.bfloat16, own)
    logger.info("Saved %s to %s", expert, path)
