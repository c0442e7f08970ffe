"""The training loop of both stages."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..experts import Expert
from .backbone import Backbone
from .batches import Video, generator_of, stacked, text_of
from .config import TrainingConfig, TrainingError
from .consistency import Batch, Roles
from .dataset import BatchOrder, TrainingData
from .discriminator import Discriminator
from .memory import Memory, estimate
from .parallel import Processes
from .stages import DetailStage, SemanticStage, Terms
from .state import History, SavedState, load_optimizer, newest_state, optimizer_tensors, save_state
from .trainee import make_trainee

logger = logging.getLogger(__name__)

# Updates in a row that may be skipped because the loss is no number.
PATIENCE = 5


class Watcher(Protocol):
    """Who is told of a run; what it raises (an interrupt) ends the run after its state is saved."""

    def step(self, done: int, steps: int, terms: dict[str, float]) -> None:
        """`done` of `steps` updates are made; the newest losses by name."""

    def sample(self, done: int, expert: Expert) -> None:
        """Time for a sample video of the expert as it is."""


class Quiet:
    """A watcher that does nothing."""

    def step(self, done: int, steps: int, terms: dict[str, float]) -> None:
        """Nobody asks."""

    def sample(self, done: int, expert: Expert) -> None:
        """Nobody looks."""


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        history: for each update its `step` and losses by name.
        seconds: of this run, without what was done before it was resumed.
    """

    expert: Expert
    history: History
    seconds: float


@dataclass
class Trainer:
    """One run.

    Attributes:
        start: the expert that is trained, as it begins; it is not kept.
        below: a finished expert that stays in place under the trained one (the semantic one, for the detail stage).
        latent_in: the host's scaling of VAE latents to what the transformer sees.
        folder: where states are kept.
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
        self.phases = config.make_phases()
        self.trainee = make_trainee(start, modules, self.device)
        self.below_working = make_trainee(below, modules, self.device, trainable=False).working if below else ()
        self.average = self.trainee.copy() if config.ema_decay else None
        self.parameters = dict(self.trainee.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )
        self.schedule = _schedule(self.optimizer, config)
        self.discriminator, self.discriminator_optimizer = self._make_discriminator()
        train, self.held_out = self.data.split(config.held_out, config.seed)
        self.order = BatchOrder(self.data.buckets_of(train), config.batch_size * self.processes.count, config.seed)
        self.no_text = text_of(self.data.unconditional(), self.backbone.family, self._guidance)
        self.history: History = []
        self.done = 0

    def run(self) -> Result:
        """Train, from the newest state in the folder if there is one.

        Raises:
            TrainingError: a state of another run, or a loss that stays no number.
        """
        self._resume()
        began = time.monotonic()
        bad = 0
        try:
            while self.done < self.config.steps:
                terms = self.processes.mean(self._update(self.done))
                bad = 0 if math.isfinite(terms["loss"]) else bad + 1
                self.done += 1
                self.history.append({"step": self.done, **terms})
                if bad == PATIENCE:
                    raise TrainingError(
                        f"The loss was no number {PATIENCE} times in a row, up to step {self.done}. The expert is saved as it was before. "
                        "Lower learning_rate, or check the data for broken latents; then resume."
                    )
                self._after_step()
        except BaseException:
            # the last good state is worth keeping, whatever ended the run
            self._save()
            raise
        return Result(self.expert(), self.history, time.monotonic() - began)

    def expert(self) -> Expert:
        """The (averaged) expert as it is now."""
        return (self.average or self.trainee).result()

    def memory(self) -> Memory:
        """What a step will need."""
        shape = max((self.data.shape(bucket[0]) for bucket in self.data.buckets), key=math.prod)
        return estimate(self.backbone, self.trainee, self.discriminator, self.config, shape, self.no_text, self.device)

    def roles(self) -> Roles:
        """Teacher, student and target network on the one backbone."""
        backbone, below = self.backbone, self.below_working
        student = (*below, *self.trainee.working)
        # the detail stage's target network is the student itself (paper, section 3.4)
        averaged = self.average if self.average and self.config.expert == "semantic" else self.trainee
        target = (*below, *averaged.working)
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
        stage = DetailStage(
            self.phases, config.cfg, config.adversarial_weight, feature_weight=config.feature_weight
        )
        return stage.losses(self.roles(), batch, self.backbone.features, self.discriminator)

    @property
    def _guidance(self) -> float | None:
        embedded = getattr(getattr(self.backbone.module, "params", None), "guidance_embed", False)
        return self.config.guidance if embedded else None

    def _make_discriminator(self) -> tuple[Discriminator | None, torch.optim.Optimizer | None]:
        config = self.config
        if config.expert == "semantic" or config.adversarial_weight == 0:
            return None, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            width = self.backbone.module.get_submodule(self.backbone.family.text_module).out_features
            discriminator = Discriminator(len(self.backbone.feature_blocks()), width, config.discriminator_width).to(self.device)
        optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=config.discriminator_learning_rate, betas=(0.0, 0.999), weight_decay=0, foreach=False
        )
        return discriminator, optimizer

    def _video(self, index: int, generator: torch.Generator) -> Video:
        x0 = self.latent_in(self.data.latent(index)[None].float())[0]
        text = text_of(self.data.conditioning(index), self.backbone.family, self._guidance)
        return Video(x0, text, self.no_text, generator)

    def _batches(self, step: int) -> Iterator[tuple[Batch, float]]:
        """The batches of one update with their shares in its loss."""
        config, size = self.config, self.config.batch_size * self.processes.count
        for part in range(config.accumulate):
            chosen = self.order.batch(step * config.accumulate + part)
            videos = [
                self._video(index, generator_of(config.seed, step, part * size + position))
                for position, index in self.processes.share(chosen)
            ]
            for batch, share in stacked(videos, self.phases, self.device):
                yield batch, share / config.accumulate

    def _update(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses, without stepping where they are no numbers."""
        sums: dict[str, float] = {}
        for batch, share in self._batches(step):
            loss, terms, discriminator_loss = self.losses(batch)
            (share * loss).backward()
            terms = {"loss": loss.detach(), **terms}
            if discriminator_loss is not None:
                judged = discriminator_loss()
                (share * judged).backward()
                terms["discriminator"] = judged.detach()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + share * float(value)
        sums["grad_norm"] = self._step(self.optimizer, list(self.parameters.values()), self.config.clip_norm)
        if self.discriminator is not None:
            self._step(self.discriminator_optimizer, list(self.discriminator.parameters()), math.inf)
        self.schedule.step()
        if self.average is not None:
            self.average.average(self.trainee, self.config.ema_decay)
        return sums

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], limit: float) -> float:
        """Average over the processes, clip, step; a gradient that is no number is thrown away."""
        self.processes.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def _after_step(self) -> None:
        config, done = self.config, self.done
        if self.held_out and (done % config.held_out_every == 0 or done == config.steps):
            self.history[-1]["held_out"] = self.held_out_loss()
        if done % config.save_every == 0 or done == config.steps:
            self._save()
        if config.sample_every and done % config.sample_every == 0 and self.processes.first:
            self.watcher.sample(done, self.expert())
        self.watcher.step(done, config.steps, self.history[-1])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The consistency loss on the held-out clips, with the same noise each time."""
        total = 0.0
        for position, index in enumerate(self.held_out):
            video = self._video(index, generator_of(self.config.seed + 1, 0, position))
            for batch, _ in stacked([video], self.phases, self.device):
                total += float(self.losses(batch)[1]["huber"])
        return total / len(self.held_out)

    def _parts(self) -> Iterator[tuple[str, dict[str, nn.Parameter], torch.optim.Optimizer | None]]:
        """(name, tensors, their optimiser) of everything a state holds."""
        yield "expert", self.parameters, self.optimizer
        if self.average is not None:
            yield "average", dict(self.average.named_parameters()), None
        if self.discriminator is not None:
            yield "discriminator", dict(self.discriminator.named_parameters()), self.discriminator_optimizer

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for part, parameters, optimizer in self._parts():
            tensors |= {f"{part}.{name}": value for name, value in parameters.items()}
            if optimizer is not None:
                tensors |= optimizer_tensors(f"{part}_optimizer", list(parameters), optimizer)
        return tensors

    def _save(self) -> None:
        if self.processes.first:
            saved = SavedState(self.done, self.config, self.facts, self.history, self._tensors())
            save_state(self.folder, saved, self.config.keep)
        self.processes.wait()

    @torch.no_grad()
    def _resume(self) -> None:
        found = newest_state(self.folder)
        if found is None:
            return
        path, saved = found
        saved.check(self.config, self.facts, path)
        for part, parameters, optimizer in self._parts():
            for name, parameter in parameters.items():
                parameter.copy_(saved.tensors[f"{part}.{name}"])
            if optimizer is not None:
                load_optimizer(f"{part}_optimizer", list(parameters), optimizer, saved.tensors)
        self.done, self.history = saved.steps, saved.history
        for _ in range(self.done):
            self.schedule.step()
        logger.info("resumed %s at step %d", path, self.done)


def _schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then constant or cosine."""
    schedulers = torch.optim.lr_scheduler
    warmup = min(config.warmup_steps, config.steps - 1)
    rest = config.steps - warmup
    after: torch.optim.lr_scheduler.LRScheduler
    if config.scheduler == "cosine":
        after = schedulers.CosineAnnealingLR(optimizer, T_max=rest)
    else:
        after = schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if warmup == 0:
        return after
    start = schedulers.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return schedulers.SequentialLR(optimizer, [start, after], milestones=[warmup])
