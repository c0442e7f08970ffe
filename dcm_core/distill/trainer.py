"""The training loop of both stages."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..experts.expert import Expert
from .backbone import Backbone, Working
from .batches import Video, generator_of, stacked, text_of
from .checkpoints import History, SavedState, check_folder, check_state, newest_state, save_state
from .config import TrainingConfig
from .data.dataset import BatchOrder, TrainingData
from .divergence import Diverged, check_losses, lowest_window
from .learner import LOSS_SCALE, STEPS_TO_RESCALE, Learner, learning_rate_at, make_learner
from .memory import Memory, step_size, total
from .method.consistency import Batch, Roles, predict
from .method.discriminator import make_discriminator
from .method.losses import pseudo_huber
from .method.stages import DetailStage, SemanticStage, Terms
from .parallel import Processes
from .signals import held_back
from .student import Student, make_fixed
from .watcher import Quiet, Watcher

logger = logging.getLogger("ComfyUI-DCM")


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        history: for each update its `step` and losses by name.
        seconds: of this run, without what was done before it was resumed.
        resumed: from which checkpoint, in words; empty for a new run.
    """

    expert: Expert
    history: History
    seconds: float
    resumed: str


@dataclass
class Trainer:
    """One run.

    Attributes:
        start: the expert that is trained, as it begins; it is not kept.
        below: a finished expert that stays in place under the trained one (the semantic one, for the detail stage).
        latent_in: the host's scaling of VAE latents to what the transformer sees.
        folder: where checkpoints are kept.
        facts: what a resumed run has to share beside its settings (the data's fingerprint, the model).
    """

    backbone: Backbone
    data: TrainingData
    config: TrainingConfig
    start: InitVar[Expert]
    folder: Path
    device: torch.device
    below: InitVar[Expert | None] = None
    latent_in: Callable[[Tensor], Tensor] = torch.Tensor.float
    facts: dict[str, str] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=Quiet)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self, start: Expert, below: Expert | None) -> None:
        config = self.config
        modules = dict(self.backbone.module.named_modules())
        self.phases = config.make_phases(self.backbone.family)
        self.student = Student(start, modules, self.device)
        self.below_working: Working = (
            () if below is None else make_fixed(below, modules, self.device, self.backbone.dtype)
        )
        self.ema = self.student.make_ema() if config.ema_decay else None
        self.learner = make_learner(
            "expert",
            dict(self.student.named_parameters()),
            config.learning_rate,
            config.clip_norm,
            weight_decay=config.weight_decay,
        )
        self.discriminator = make_discriminator(self.backbone, config).to(self.device) if config.adversarial else None
        self.discriminator_learner = self._make_discriminator_learner() if config.adversarial else None
        self.loss_scale = LOSS_SCALE if self.backbone.dtype is torch.float16 else 1.0
        train, self.held_out = self.data.split(config.held_out, config.seed)
        self.order = BatchOrder(self.data.buckets_of(train), config.batch_size * self.processes.count, config.seed)
        self.no_text = text_of(self.data.unconditional(), self.backbone.family, self._guidance)
        self.history: History = []
        self.saved = 0
        self.worth_saving = True

    @property
    def done(self) -> int:
        """Updates made so far."""
        return len(self.history)

    def run(self) -> Result:
        """Train, from the newest checkpoint in the folder if there is one.

        Raises:
            TrainingError: a checkpoint of another run, or losses that stay NaN or infinite, or diverge.
            CheckpointError: a folder that cannot be written to, or a disk without room for the checkpoints.
        """
        resumed = self._resume()
        if self.processes.first:
            self._check_room()
        began = time.monotonic()
        try:
            self._hold_out()
            while self.done < self.config.steps:
                self._update()
                check_losses(self.history, self.config)
                self._after_step()
        except Diverged:
            raise
        except BaseException as error:
            # the last good checkpoint is worth keeping, whatever ended the run; others may wait elsewhere
            if self.worth_saving and self.done > self.saved:
                self._save()
            self.watcher.stopped(self.saved, self.config.steps, error)
            raise
        return Result(self.expert(), self.history, time.monotonic() - began, resumed)

    def expert(self) -> Expert:
        """The (averaged) expert as it is now."""
        return (self.ema or self.student).to_expert()

    def memory(self) -> Memory:
        """What the run will need; makes a step that teaches nothing."""
        example = max((bucket[0] for bucket in self.data.buckets), key=lambda index: math.prod(self.data.shape(index)))
        channels, *largest = self.data.shape(example)
        text = text_of(self.data.conditioning(example), self.backbone.family, self._guidance)
        trained = total(self.learner.parameters.values())
        judging = total(self.discriminator_learner.parameters.values()) if self.discriminator_learner else 0

        def step(shape: tuple[int, ...]) -> None:
            x0 = torch.zeros(channels, *shape[1:])
            videos = [Video(x0, text, self.no_text, generator_of(0, 0, element)) for element in range(shape[0])]
            for batch, share in stacked(videos, self.phases, self.device):
                self._learn(batch, share)

        try:
            for learner in self._learners:
                learner.expect()
            size = max(
                step_size(step, (self.config.batch_size, *largest)), *(learner.scratch for learner in self._learners)
            )
        finally:
            self._forget()
        below = sum(total(part.parameters()) for part, _ in self.below_working)
        present = trained * (2 if self.ema else 1) + judging + below
        return Memory(
            total(self.backbone.module.parameters()), present, 2 * (trained + judging), trained + judging + size
        )

    def roles(self) -> Roles:
        """Teacher, student and target network on the one backbone."""
        backbone, below = self.backbone, self.below_working
        student = (*below, *self.student.working)
        # the detail stage's target network is the student itself (paper, section 3.4)
        target_network = self.ema if self.ema and self.config.expert == "semantic" else self.student
        target = (*below, *target_network.working)
        return Roles(
            student=lambda x, sigma, text: backbone.velocity(x, sigma, text, student),
            teacher=lambda x, sigma, text: backbone.velocity(x, sigma, text),
            target=lambda x, sigma, text: backbone.velocity(x, sigma, text, target),
        )

    def losses(self, batch: Batch) -> tuple[Tensor, Terms, Callable[[], Tensor] | None]:
        """The student's loss for one batch, its terms, and the discriminator's loss."""
        config = self.config
        if config.expert == "semantic":
            return *SemanticStage(self.phases, config.cfg, config.temporal_weight).losses(self.roles(), batch), None
        stage = DetailStage(self.phases, config.cfg, config.adversarial_weight, feature_weight=config.feature_weight)
        return stage.losses(self.roles(), batch, self.backbone.features, self.discriminator)

    @property
    def _guidance(self) -> float | None:
        embedded = getattr(getattr(self.backbone.module, "params", None), "guidance_embed", False)
        return self.config.guidance if embedded else None

    def _make_discriminator_learner(self) -> Learner:
        parameters, rate = dict(self.discriminator.named_parameters()), self.config.discriminator_learning_rate
        return make_learner("discriminator", parameters, rate, betas=(0.0, 0.999), weight_decay=0.0)

    def _video(self, index: int, generator: torch.Generator) -> Video:
        text = text_of(self.data.conditioning(index), self.backbone.family, self._guidance)
        return Video(self.latent_in(self.data.latent(index)[None].float())[0], text, self.no_text, generator)

    def _batches(self, step: int) -> Iterator[tuple[Batch, float]]:
        """The batches of one update with their shares in its loss."""
        config, size = self.config, self.config.batch_size * self.processes.count
        for part in range(config.accumulate):
            chosen = self.order.batch(step * config.accumulate + part)
            videos = [
                self._video(index, generator_of(config.seed, step, part * size + position))
                for position, index in self.processes.share(chosen)
            ]
            yield from (
                (batch, share / config.accumulate) for batch, share in stacked(videos, self.phases, self.device)
            )

    def _update(self) -> None:
        """One step of the optimisers, and its losses in the history."""
        scale = self.loss_scale
        terms, norm = self._gradients(self.done), self.learner.gather(self.processes, self.loss_scale)
        while not math.isfinite(norm) and math.isfinite(terms["loss"]) and self.loss_scale > 1:
            # too large for float16: the same step again
            self.loss_scale /= 2
            self._forget()
            terms, norm = self._gradients(self.done), self.learner.gather(self.processes, self.loss_scale)
        if not math.isfinite(norm):
            # not for its scale: the step is passed over
            self.loss_scale = scale
        judging_norm = self.discriminator_learner and self.discriminator_learner.gather(self.processes)
        with held_back():  # half an update is not worth saving; nothing in it waits for other processes
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

    def _gradients(self, step: int) -> dict[str, float]:
        """Add up the gradients of a step; the mean losses of all processes."""
        sums: dict[str, float] = {}
        for batch, share in self._batches(step):
            for name, value in self._learn(batch, share).items():
                sums[name] = sums.get(name, 0.0) + share * float(value)
        return self.processes.mean(sums)

    def _learn(self, batch: Batch, share: float) -> Terms:
        """Add the gradients of a batch; its losses."""
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

    def _forget(self) -> None:
        for learner in self._learners:
            learner.forget()

    def _after_step(self) -> None:
        config, done = self.config, self.done
        self._hold_out()
        if done % config.save_every == 0 or done == config.steps:
            self._save()
            self.processes.wait()
        if config.sample_every and done % config.sample_every == 0 and self.processes.first:
            self.watcher.sample(done, self.expert())
        self.watcher.step(self.history, config.steps)

    def _hold_out(self) -> None:
        """The held-out loss, where the last step wants it and has none yet: an interrupt may have come between."""
        config, done = self.config, self.done
        due = self.held_out and done and (done % config.held_out_every == 0 or done == config.steps)
        if due and "held_out" not in self.history[-1]:
            self.history[-1]["held_out"] = self.held_out_loss()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The consistency loss on the held-out clips, with the same noise each time."""
        total = 0.0
        for position, index in enumerate(self.held_out):
            video = self._video(index, generator_of(self.config.seed + 1, 0, position))
            for batch, _ in stacked([video], self.phases, self.device):
                total += float(pseudo_huber(*predict(self.roles(), batch, self.phases, self.config.cfg)))
        return total / len(self.held_out)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        tensors = self.learner.tensors()
        if self.backbone.dtype is torch.float16:
            tensors["loss_scale"] = torch.tensor(self.loss_scale)
        if self.discriminator_learner is not None:
            tensors |= self.discriminator_learner.tensors()
        if self.ema is not None:
            tensors |= {f"average.{name}": value for name, value in self.ema.named_parameters()}
        return tensors

    def _check_room(self) -> None:
        """See that the checkpoints can be written, before any step is made."""
        # weights and AdamW's two moments of each
        size = 3 * sum(total(learner.parameters.values()) for learner in self._learners)
        size += total(self.learner.parameters.values()) if self.ema else 0
        saves = -(-(self.config.steps - self.done) // self.config.save_every)
        check_folder(self.folder, size, min(saves, self.config.keep + 1))

    @held_back()  # who is impatient presses again
    def _save(self) -> None:
        if self.processes.first:
            saved = SavedState(self.done, self.config, self.facts, self.history, self._tensors())
            # if the run diverges, it is resumed from there
            lowest = lowest_window(self.history) if self.config.divergence else 0
            save_state(self.folder, saved, self.config.keep, lowest)
        self.saved = self.done

    @torch.no_grad()
    def _resume(self) -> str:
        """Take up the newest checkpoint, if there is one; what that means in words."""
        check_state(self.folder, self.config, self.facts)  # of other settings: told of by them, not as damaged
        found = newest_state(self.folder, {name: tuple(value.shape) for name, value in self._tensors().items()})
        if found is None:
            return ""
        path, saved = found
        saved.check(self.config, self.facts, path)
        for learner in self._learners:
            learner.load(saved.tensors)
        for name, value in self.ema.named_parameters() if self.ema else ():
            value.copy_(saved.tensors[f"average.{name}"])
        self.loss_scale = float(saved.tensors.get("loss_scale", self.loss_scale))
        self.history, self.saved = saved.history, saved.steps
        logger.info("%s: %s", path, words := saved.in_words(self.config))
        self.watcher.resumed(words)
        return words
