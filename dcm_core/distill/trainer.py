"""The training loop of both stages."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import name_some
from ..experts.expert import Expert
from ..text import LOGGER
from .backbone import Backbone, Working
from .batches import Batches, ImageIn
from .checkpoint_file import EMA, LOSS_SCALE_NAME, Checkpoint, History
from .checkpoints import check_folder, check_resumable, in_all_processes, newest_checkpoint, save_checkpoint
from .config import TrainingConfig
from .data.dataset import Dataset
from .divergence import Diverged, Stuck, best_step, check_any_made, check_losses, is_skipped, skipped_in_words
from .learner import LOSS_SCALE, STEPS_TO_RESCALE, Learner, discriminator_learner, expert_learner, learning_rate_at
from .memory import Memory, step_size, total
from .method.consistency import Batch, Networks, predict
from .method.discriminator import make_discriminator
from .method.losses import pseudo_huber
from .method.stages import DetailStage, SemanticStage, Terms
from .parallel import Processes
from .samples import sample_latents
from .sharding import collected, complete_shape, complete_size, divide, fill
from .signals import held_back
from .student import Student, make_fixed
from .watcher import Quiet, Watcher

logger = logging.getLogger(LOGGER)

# Clips of a skipped step that a message names.
NAMED_CLIPS = 8


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        history: for each step, its number `step` and its losses by name.
        seconds: time of this run, not counting steps before it was resumed.
        resumed: which checkpoint it was resumed from, as text; empty for a new run.
        skipped: how many of all steps were skipped, as text; empty for none.
    """

    expert: Expert
    history: History
    seconds: float
    resumed: str
    skipped: str


@dataclass
class Trainer:
    """One training run.

    Attributes:
        start: the expert to start from. It is not kept.
        semantic: the finished semantic expert that a detail expert is trained on top of.
        latent_in, image_in: see `Batches`.
        folder: folder of the checkpoints.
        identity: see `Checkpoint`.
    """

    backbone: Backbone
    data: Dataset
    config: TrainingConfig
    start: InitVar[Expert]
    folder: Path
    device: torch.device
    semantic: InitVar[Expert | None] = None
    latent_in: Callable[[Tensor], Tensor] = torch.Tensor.float
    image_in: ImageIn | None = None
    identity: dict[str, str] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=Quiet)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self, start: Expert, semantic: Expert | None) -> None:
        config = self.config
        modules = dict(self.backbone.module.named_modules())
        self.phases = config.make_phases(self.backbone.family)
        self.of_pair = start.pair is not None
        self.student = Student(start, modules, self.device, self.processes)
        self.semantic_working: Working = (
            () if semantic is None else make_fixed(semantic, modules, self.device, self.backbone.dtype, self.processes)
        )
        self.ema = self.student.make_ema() if config.ema_decay else None
        self.learner = expert_learner(self.student, config)
        self.discriminator = make_discriminator(self.backbone, config) if config.adversarial else None
        if self.discriminator is not None and self.processes.sharded:
            divide(self.discriminator, self.processes, self.device)
        elif self.discriminator is not None:
            self.discriminator.to(self.device)
        self.discriminator_learner = discriminator_learner(self.discriminator, config) if config.adversarial else None
        self.loss_scale = LOSS_SCALE if self.backbone.dtype is torch.float16 else 1.0
        train, self.held_out = self.data.split(config.held_out, config.seed)
        self.batches = Batches(
            self.data,
            train,
            config,
            self.phases,
            self.backbone.family,
            guidance=self._guidance,
            processes=self.processes,
            device=self.device,
            latent_in=self.latent_in,
            image_in=self.image_in,
        )
        self.history: History = []
        # clips in batches of the current step whose losses are NaN or infinite
        self.suspects: list[int] = []
        self.saved = 0
        self.worth_saving = True

    @property
    def done(self) -> int:
        """Number of steps done so far."""
        return len(self.history)

    def run(self) -> Result:
        """Train, from the newest checkpoint in the folder if there is one.

        Raises:
            TrainingError: the checkpoint is of another run, or losses stay NaN or infinite, or diverge.
            CheckpointError: the folder cannot be written to, or there is not enough room for the checkpoints.
        """
        resumed = self._resume()
        with self.processes.agreed():
            if self.processes.first:
                self._check_room()
        began = time.monotonic()
        try:
            self._hold_out()
            # a divided expert can only be saved by all processes, so they stop together between two steps
            with held_back() if self.processes.sharded else nullcontext([]) as signals:
                while self.done < self.config.steps:
                    self._training_step()
                    check_losses(self.history, self.config)
                    self._after_step()
                    if self.processes.sharded and self.processes.any(bool(signals)):
                        self._save()
                        raise KeyboardInterrupt
        except Diverged:
            raise
        except BaseException as error:
            # save what was learned, whatever ended the run; other processes may be waiting elsewhere, but all are stuck together
            together = not self.processes.sharded or isinstance(error, Stuck)
            if self.worth_saving and self.done > self.saved and together:
                self._save()
            self.watcher.stopped(self.saved, self.config.steps, error)
            raise
        check_any_made(self.history)
        return Result(self.expert(), self.history, time.monotonic() - began, resumed, skipped_in_words(self.history))

    def expert(self) -> Expert:
        """The current expert: the EMA if there is one, else the student."""
        return (self.ema or self.student).to_expert()

    def memory(self) -> Memory:
        """Estimate the memory of the run. It runs steps that do not change the weights."""
        example = max((bucket[0] for bucket in self.data.buckets), key=lambda index: math.prod(self.data.shape(index)))
        channels, *largest = self.data.shape(example)
        trained = total(self.learner.parameters.values())
        judging = total(self.discriminator_learner.parameters.values()) if self.discriminator_learner else 0

        def step(shape: tuple[int, ...]) -> None:
            for batch, share in self.batches.empty(example, (shape[0], channels, *shape[1:])):
                self._learn(batch, share)

        try:
            if self.processes.sharded:
                # FSDP makes buffers in its first step, and keeps them emptied; `completed` counts them
                step((1, 1, 2, 2))
                self._zero_grad()
            for learner in self._learners:
                learner.allocate_gradients()
            size = max(
                step_size(step, (self.config.batch_size, *largest), self.device),
                *(learner.scratch for learner in self._learners),
            )
        finally:
            self._zero_grad()
        size += self.backbone.completed if self.processes.sharded else 0
        semantic = sum(total(part.parameters()) for part, _ in self.semantic_working)
        present = trained * (2 if self.ema else 1) + judging + semantic
        moments = sum(learner.moments for learner in self._learners)
        return Memory(self.backbone.size, present, moments, trained + judging + size)

    def networks(self) -> Networks:
        """Teacher, student and target network on the shared backbone."""
        backbone, semantic = self.backbone, self.semantic_working
        student = (*semantic, *self.student.working)
        # the detail stage's target network is the student itself (paper, section 3.4)
        target_network = self.ema if self.ema and self.config.side == "semantic" else self.student
        target = (*semantic, *target_network.working)
        return Networks(
            student=lambda x, sigma, text: backbone.velocity(x, sigma, text, student),
            teacher=lambda x, sigma, text: backbone.velocity(x, sigma, text),
            target=lambda x, sigma, text: backbone.velocity(x, sigma, text, target),
        )

    def losses(self, batch: Batch) -> tuple[Tensor, Terms, Callable[[], Tensor] | None]:
        """The student's loss for one batch, its terms, and the discriminator's loss."""
        config = self.config
        if config.side == "semantic":
            return *SemanticStage(self.phases, config.cfg, config.temporal_weight).losses(self.networks(), batch), None
        stage = DetailStage(self.phases, config.cfg, config.adversarial_weight, feature_weight=config.feature_weight)
        return stage.losses(self.networks(), batch, self.backbone.features, self.discriminator)

    @property
    def _guidance(self) -> float | None:
        embedded = getattr(getattr(self.backbone.module, "params", None), "guidance_embed", False)
        return self.config.guidance if embedded else None

    def _training_step(self) -> None:
        """One step of the optimisers. Its losses are added to the history."""
        scale = self.loss_scale
        terms, norm = self._gradients(self.done), self.learner.gather(self.processes, self.loss_scale)
        while not math.isfinite(norm) and math.isfinite(terms["loss"]) and self.loss_scale > 1:
            # the loss scale was too large for float16: repeat the step
            self.loss_scale /= 2
            self._zero_grad()
            terms, norm = self._gradients(self.done), self.learner.gather(self.processes, self.loss_scale)
        if not math.isfinite(norm):
            # the scale was not the reason: skip the step
            self.loss_scale = scale
        judging_norm = self.discriminator_learner and self.discriminator_learner.gather(self.processes)
        # an interrupt waits: a checkpoint in the middle of a step would be useless; nothing here waits for other processes
        with held_back():
            self.worth_saving = False
            self.learner.set_learning_rate(learning_rate_at(self.done, self.config))
            self.learner.step(norm)
            if self.discriminator_learner is not None:
                self.discriminator_learner.step(judging_norm)
            if self.ema is not None:
                self.ema.update_ema(self.student, self.config.ema_decay)
            self.history.append({"step": self.done + 1, **terms, "grad_norm": norm})
            if self.done % STEPS_TO_RESCALE == 0 and self.loss_scale > 1:
                self.loss_scale = min(2 * self.loss_scale, LOSS_SCALE)
            self.worth_saving = True
        if is_skipped(self.history[-1]):
            self._tell_skipped()

    def _tell_skipped(self) -> None:
        """Name the clips of a skipped step."""
        found = [clip for clips in self.processes.gather(self.suspects) for clip in clips]
        # gradients may be infinite though every loss is finite
        clips = dict.fromkeys(found or self.batches.clips_of_step(self.done - 1))
        self.watcher.skipped(
            f"Step {self.done} was skipped: its loss or gradient is NaN or infinite. Clips in it: "
            f"{name_some(map(self.data.name, clips), NAMED_CLIPS)}."
        )

    def _gradients(self, step: int) -> dict[str, float]:
        """Accumulate the gradients of a step. Returns the mean losses of all processes."""
        sums: dict[str, float] = {}
        self.suspects = []
        for batch, share in self.processes.evenly(self.batches.of_step(step)):
            terms = {name: float(value) for name, value in self._learn(batch, share).items()}
            if not all(map(math.isfinite, terms.values())):
                self.suspects += batch.clips
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + share * value
        return self.processes.mean(sums)

    def _learn(self, batch: Batch, share: float) -> Terms:
        """Add the gradients of a batch. Returns its losses."""
        loss, terms, discriminator_loss = self.losses(batch)
        (self.loss_scale * share * loss).backward()
        terms = {"loss": loss.detach(), **terms}
        if discriminator_loss is not None:
            judged = discriminator_loss()
            (share * judged).backward()
            terms["discriminator"] = judged.detach()
        return terms

    @property
    def _learners(self) -> list[Learner]:
        return [learner for learner in (self.learner, self.discriminator_learner) if learner is not None]

    def _zero_grad(self) -> None:
        for learner in self._learners:
            learner.zero_grad()

    def _after_step(self) -> None:
        config, done = self.config, self.done
        self._hold_out()
        if done % config.save_every == 0 or done == config.steps:
            self._save()
            self.processes.wait()
        if config.sample_every and done % config.sample_every == 0:
            self._sample()
        self.watcher.step(self.history, config.steps)

    def _sample(self) -> None:
        if not self.processes.sharded:
            if self.processes.first:
                self.watcher.sample(self.done, self.expert())
            return
        working: Working = (self.ema or self.student).working
        # the semantic expert is on at all steps, as where the detail expert is trained
        all_steps, detail_steps = (working, ()) if self.config.side == "semantic" else (self.semantic_working, working)
        latents = sample_latents(self.backbone, self.batches, self.config, all_steps, detail_steps, self.of_pair)
        if self.processes.first:
            self.watcher.sampled(self.done, latents)

    def _hold_out(self) -> None:
        """Measure the held-out loss if the last step needs it. An interrupt may have come before it was measured."""
        config, done = self.config, self.done
        due = self.held_out and done and (done % config.held_out_every == 0 or done == config.steps)
        if due and "held_out" not in self.history[-1]:
            self.history[-1]["held_out"] = self.held_out_loss()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The consistency loss on the held-out clips. Their noise is the same each time."""
        total = 0.0
        for position, index in enumerate(self.held_out):
            batch = self.batches.held_out(position, index)
            total += float(pseudo_huber(*predict(self.networks(), batch, self.phases, self.config.cfg)))
        return total / len(self.held_out)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        tensors = self.learner.tensors()
        if self.backbone.dtype is torch.float16:
            tensors[LOSS_SCALE_NAME] = torch.tensor(self.loss_scale)
        if self.discriminator_learner is not None:
            tensors |= self.discriminator_learner.tensors()
        if self.ema is not None:
            tensors |= {f"{EMA}.{name}": value for name, value in self.ema.named_parameters()}
        return tensors

    def _check_room(self) -> None:
        """Check before the first step that the checkpoints can be written."""
        # each weight with its two AdamW moments
        parts = self.processes.parts
        size = sum(complete_size(learner.parameters.values()) + parts * learner.moments for learner in self._learners)
        size += complete_size(self.learner.parameters.values()) if self.ema else 0
        saves = -(-(self.config.steps - self.done) // self.config.save_every)
        check_folder(self.folder, size, min(saves, self.config.keep + 1))

    @held_back()  # impatient users interrupt twice
    def _save(self) -> None:
        if self.saved == self.done:
            return
        tensors = collected(self._tensors(), self.processes) if self.processes.sharded else self._tensors()
        if self.processes.first:
            checkpoint = Checkpoint(self.done, self.config, self.identity, self.history, tensors)
            # a run that diverges can be resumed from there
            best = best_step(self.history) if self.config.divergence else 0
            save_checkpoint(self.folder, checkpoint, self.config.keep, best)
        self.saved = self.done

    @torch.no_grad()
    def _resume(self) -> str:
        """Load the newest checkpoint, if there is one. Returns what that means, as text."""
        loaded: dict[str, Tensor] = {}

        def newest() -> tuple[Path, Checkpoint] | None:
            # first, so that other settings are not reported as damage
            check_resumable(self.folder, self.config, self.identity)
            shapes = {name: complete_shape(value) for name, value in self._tensors().items()}
            if (found := newest_checkpoint(self.folder, shapes)) is None:
                return None
            path, saved = found
            saved.check(self.config, self.identity, path)
            loaded.update(saved.tensors)
            return path, replace(saved, tensors={})

        if (found := self.processes.from_first(newest)) is None:
            return ""
        path, saved = found
        tensors = in_all_processes(self.folder / path.name, loaded, self.processes)
        for learner in self._learners:
            learner.load(tensors)
        for name, value in self.ema.named_parameters() if self.ema else ():
            fill(value, tensors[f"{EMA}.{name}"])
        self.loss_scale = float(tensors.get(LOSS_SCALE_NAME, self.loss_scale))
        self.history, self.saved = saved.history, saved.steps
        words = saved.in_words(self.config, self.identity)
        if self.processes.first:
            logger.info("%s: %s", path, words)
        self.watcher.resumed(words)
        return words
