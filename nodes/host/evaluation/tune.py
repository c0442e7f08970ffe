"""Search for strengths, a boundary and noise levels that bring experts closest to their reference."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dcm_core.errors import DCMError, check_choice, counted
from ....dcm_core.evaluation.collect import row_rms, spread, step_target
from ....dcm_core.evaluation.measures import energy_distance
from ....dcm_core.evaluation.search import Setting, Settings, Trials, search
from ....dcm_core.experts.expert import Expert, expert_id
from ....dcm_core.routing import is_detail
from ....dcm_core.schedule import TIMESTEPS, even_sigmas
from ..experts.attach import attach_experts
from ..report import tell
from ..sampling.run import make_guider
from ..sampling.schedules import with_shift
from ..training.encoders import weights_id
from .compare import (
    Candidate,
    Progress,
    Reference,
    Task,
    Ways,
    check_task,
    make_candidate,
    run_reference,
    with_schedule,
)
from .way import estimates_on, model_way

STEPS, VIDEOS, SETS = "error of the steps", "error of the videos", "energy distance"
DISTANCES = (STEPS, VIDEOS, SETS)
SEMANTIC, DETAIL, FIRST_STEPS = "semantic_strength", "detail_strength", "first_steps"
# Strengths: limits, first and last change.
STRENGTHS = (0.0, 3.0, 0.2, 0.025)
# Levels of the reference that a step's start is moved by at first.
LEVELS = 4


@dataclass(frozen=True)
class Start:
    """The settings that a search starts from.

    Attributes:
        experts, strengths: for each side. A side without an expert is None.
        boundary: 0 uses the experts' own.
        schedule, steps, shift, cfg: as in DCM Sampler.
    """

    experts: Mapping[str, Expert | None]
    strengths: Mapping[str, float]
    boundary: float
    stacked: bool
    schedule: str
    steps: int
    shift: float
    cfg: float


@dataclass(frozen=True)
class Searched:
    """What may change.

    Raises:
        DCMError: nothing.
    """

    strengths: bool = True
    boundary: bool = True
    steps: bool = False

    def __post_init__(self) -> None:
        if not (self.strengths or self.boundary or self.steps):
            raise DCMError("Nothing is searched. Turn on search_strengths, search_boundary or search_steps.")


@dataclass
class Tuner:
    """Measures combinations of settings.

    Attributes:
        model: the base.
        experts, strengths: by the names of `attach_experts`; the strengths are those at the start.
        sigmas, boundary: those at the start.
        grid: the noise levels that a step may start from, the last 0: the reference's if steps are searched, else `sigmas`.
        ways: the reference's runs at the levels of the grid.
    """

    model: Any
    experts: Mapping[str, Expert]
    strengths: Mapping[str, float]
    stacked: bool
    sigmas: Tensor
    boundary: float
    cfg: float
    reference: Reference
    task: Task
    searched: Searched
    distance: str = STEPS
    grid: list[float] = field(init=False)
    ways: Ways | None = None

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        if self.distance == SETS and self.task.runs * len(self.task.latent["samples"]) < 3:
            raise DCMError(
                f"distance is {SETS}, which needs 3 videos or more. Raise seeds, or choose another distance."
            )
        grid = even_sigmas(self.reference.steps, self.reference.shift) if self.searched.steps else self.sigmas
        self.grid = grid.tolist()
        if len(self.grid) < len(self.sigmas):
            raise DCMError(
                f"reference_steps is {self.reference.steps}; expected at least the {counted(self.steps, 'step')} "
                "that are searched, as they start at the reference's noise levels."
            )
        check_task(self.candidate(self.start), self.reference, self.task)

    @property
    def start(self) -> Settings:
        """The settings to start from. Steps are named by the place of their noise level in the grid."""
        levels = self.sigmas[:-1].tolist()
        places = nearest_places(levels, self.grid[:-1]) if self.searched.steps else list(range(self.steps))
        first = first_steps(self.sigmas, self.boundary)
        return {
            **self.strengths,
            FIRST_STEPS: float(min(max(first, 1), self.steps)),
            **{f"step {number}": float(place) for number, place in enumerate(places, 1)},
        }

    @property
    def settings(self) -> list[Setting]:
        """What is searched: the boundary first, as a wrong one spoils the strengths."""
        last, found = len(self.grid) - 2, []
        if self.searched.boundary and self.steps > 1 and ("detail" in self.experts or not self.stacked):
            found.append(Setting(FIRST_STEPS, 1, self.steps, 1, 1))
        if self.searched.strengths:
            low, high, step, finest = STRENGTHS
            found += [
                Setting(name, min(low, value), max(high, value), step, finest) for name, value in self.strengths.items()
            ]
        if self.searched.steps:
            # the first step starts from noise
            found += [Setting(f"step {number}", 1, last, min(LEVELS, last), 1) for number in range(2, self.steps + 1)]
        return found

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def sigmas_of(self, settings: Settings) -> Tensor | None:
        """The noise levels of settings; None if they do not fall."""
        places = [int(value) for name, value in settings.items() if name.startswith("step ")]
        if any(later <= earlier for earlier, later in pairwise(places)):
            return None
        return torch.tensor([*(self.grid[place] for place in places), 0.0])

    def boundary_of(self, settings: Settings) -> float:
        """A boundary that gives the first side its steps: in the middle of two noise levels, with few decimals."""
        sigmas, first = self.sigmas_of(settings), int(settings[FIRST_STEPS])
        if first == first_steps(sigmas, self.boundary):
            return self.boundary
        above, under = sigmas[first - 1 : first + 1].tolist()
        middle = (above + under) / 2
        return next(value for digits in (2, 3, 4, 9) if under < (value := round(middle, digits)) <= above)

    def candidate(self, settings: Settings) -> Candidate | None:
        """The model with these settings; None if they do not fit together."""
        sigmas = self.sigmas_of(settings)
        if sigmas is None:
            return None
        strengths = {name: settings[name] for name in self.strengths}
        boundary = self.boundary_of(settings)
        model = attach_experts(self.model, **self.experts, **strengths, boundary=boundary, stacked=self.stacked)
        return make_candidate(model, sigmas, self.cfg)

    @property
    def reference_calls(self) -> int:
        return self.reference.steps * self.task.runs * asked(self.reference.cfg)

    @property
    def trial_calls(self) -> int:
        return self.steps * self.task.runs * asked(self.cfg)

    def identity(self) -> dict[str, Any]:
        """What trials depend on. Those of a search with anything else are not used."""
        return {
            "model": weights_id(self.model),
            "reference model": weights_id(self.reference.model),
            "reference": str(self.reference),
            "experts": {side: expert_id(expert) for side, expert in self.experts.items()},
            "stacked": self.stacked,
            "cfg": self.cfg,
            "distance": self.distance,
            "schedule": [round(level, 6) for level in self.grid],
            "prompts": [prompt_id(prompt) for prompt in self.task.positives],
            "negative": None if self.task.negative is None else prompt_id(self.task.negative),
            "size": list(self.task.latent["samples"].shape),
            "seed": self.task.seed,
            "seeds": self.task.seeds,
        }

    def measure(self, settings: Settings, tick: Callable[[], None]) -> float:
        """The distance of settings."""
        candidate = self.candidate(settings)
        if candidate is None:
            return math.inf
        places = [self.grid.index(level) for level in map(self._on_grid, candidate.levels)]
        errors, finals = [], []
        for number, positive, seed in self.task.each():
            way = [self.ways.ways[number][place] for place in places]
            guider = make_guider(candidate.model, positive, self.task.negative, candidate.cfg)
            if self.distance == STEPS:
                own = estimates_on(guider, self.task.latent, way, candidate.sigmas, seed, tick)
                for step, estimate in enumerate(own):
                    target, scale = step_target(way, candidate.levels, step)
                    errors.append(row_rms(estimate - target) / scale)
            else:
                along, _ = model_way(guider, self.task.latent, candidate.sigmas, seed, tick)
                finals.append(along[-1])
                errors.append(row_rms(along[-1] - way[-1]) / spread(way[-1]))
        if self.distance == SETS:
            return energy_distance(torch.cat(finals), torch.cat([way[-1] for way in self.ways.ways]))[0]
        return float(torch.cat(errors).square().mean().sqrt())

    def _on_grid(self, level: float) -> float:
        return min(self.grid, key=lambda known: abs(known - level))


def make_tuner(
    model: Any, start: Start, reference: Reference, task: Task, searched: Searched, distance: str
) -> tuple[Tuner, list[str]]:
    """A tuner for a base MODEL, and notes about its schedule for the user.

    Raises:
        DCMError: anything that does not fit, before any model call.
    """
    experts = {side: expert for side, expert in start.experts.items() if expert is not None}
    if not experts:
        raise DCMError("semantic_lora and detail_lora are both none. Choose at least one expert file.")
    strengths = {f"{side}_strength": start.strengths[side] for side in experts}
    for side, strength in start.strengths.items():
        if not math.isfinite(strength):
            raise DCMError(f"{side}_strength is {strength}; expected a number from 0 to 10.")
    attached = attach_experts(model, **experts, **strengths, boundary=start.boundary, stacked=start.stacked)
    candidate, notes = with_schedule(attached, start.schedule, start.steps, start.shift, start.cfg)
    base = with_shift(model, start.schedule, start.shift)
    tuner = Tuner(
        base,
        experts,
        strengths,
        start.stacked,
        candidate.sigmas,
        candidate.boundary,
        start.cfg,
        reference,
        task,
        searched,
        distance,
    )
    return tuner, notes


def first_steps(sigmas: Tensor, boundary: float) -> int:
    """How many steps are above the boundary."""
    return int((~is_detail(sigmas[:-1], boundary)).sum())


def asked(cfg: float) -> int:
    """Model calls of a step: with guidance, two."""
    return 1 if cfg == 1 else 2


def nearest_places(levels: Sequence[float], grid: Sequence[float]) -> list[int]:
    """The place of the nearest grid level for each level, every place once, the first 0."""
    places: list[int] = []
    for number, level in enumerate(levels):
        left = len(levels) - number - 1
        possible = range(places[-1] + 1 if places else 0, len(grid) - left)
        places.append(min(possible, key=lambda place: abs(grid[place] - level)) if places else 0)
    return places


def prompt_id(conditioning: list) -> str:
    """A hash of a prompt's embeddings."""
    digest = hashlib.sha256()
    for embedding, _ in conditioning:
        digest.update(f"{tuple(embedding.shape)}".encode() + embedding.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        strengths, boundary, sigmas: those of the best trial.
        words: who runs which step then.
    """

    trials: Trials
    strengths: dict[str, float]
    boundary: float
    sigmas: Tensor
    words: str

    def __str__(self) -> str:
        best, first = self.trials.best, self.trials.done[0]
        less = 1 - best.distance / first.distance if first.distance > 0 else 0.0
        timesteps = ", ".join(f"{TIMESTEPS * level:.4g}" for level in self.sigmas[:-1].tolist())
        lines = [
            f"Distance {best.distance:.4g}, {100 * less:.0f} % less than the {first.distance:.4g} of the settings at the start",
            *(f"{name} {value:g}" for name, value in self.strengths.items()),
            f"boundary {self.boundary:g} ({self.words})",
            f"timesteps {timesteps}",
            f"{counted(len(self.trials.done), 'trial')}, {counted(self.trials.calls, 'model call')} of {self.trials.budget}",
        ]
        if self.trials.resumed:
            lines.append(f"Resumed after {counted(self.trials.resumed, 'trial')}")
        lines.append("Check the result with DCM Compare and other seeds")
        return "\n".join(lines)


def tune(tuner: Tuner, budget: int, path: Path | None = None, node_id: str | None = None) -> Tuned:
    """Search until no change helps or the budget of model calls is used up. MODEL is unchanged.

    Args:
        path: a file for finished trials; a search resumes from it.

    Raises:
        DCMError: a budget that is too small, or trials of another search, before any model call.
    """
    needed = tuner.reference_calls + tuner.trial_calls
    if budget < needed:
        raise DCMError(
            f"calls is {budget}, but the reference alone needs {tuner.reference_calls} and a trial {tuner.trial_calls}. "
            f"Set calls to {needed + 20 * tuner.trial_calls} or more, or lower seeds."
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    trials = Trials(path, tuner.identity(), budget, tuner.reference_calls)
    progress = Progress(budget, node_id)
    tuner.ways = run_reference(
        tuner.reference, tuner.task, tuner.grid, lambda: progress.tick(asked(tuner.reference.cfg))
    )
    progress.done = max(progress.done, trials.calls)
    cost = asked(tuner.cfg)

    def measure(settings: Settings) -> float:
        if trials.done:
            tell(f"{counted(len(trials.done), 'trial')}, lowest distance {trials.best.distance:.4g}", node_id)
        calls = tuner.trial_calls if tuner.sigmas_of(settings) is not None else 0
        return trials.measure(settings, calls, lambda tried: tuner.measure(tried, lambda: progress.tick(cost)))

    search(tuner.settings, tuner.start, measure)
    best = trials.best.settings
    candidate = tuner.candidate(best)
    strengths = {name: best[name] for name in tuner.strengths}
    return Tuned(trials, strengths, tuner.boundary_of(best), candidate.sigmas, candidate.words)
