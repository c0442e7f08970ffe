"""A set of trained tensors with its AdamW optimiser, whose moments may have 8 bits."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families.keymap import Shape
from .config import TrainingConfig, TrainingError
from .parallel import Processes
from .sharding import Shard, clip_gradients, fill

# Loss scale for models that compute in float16: without it, gradients of a video underflow.
# PyTorch's GradScaler is not used: it grows without limit, and its step count would have to be saved and resumed.
LOSS_SCALE = 2.0**16
# After it was lowered, it is doubled again after this many steps.
STEPS_TO_RESCALE = 1000
# PyTorch's AdamW's state of each parameter, in the parameter's shape; and that of bitsandbytes.
MOMENTS, MOMENTS_8BIT = ("exp_avg", "exp_avg_sq"), ("state1", "state2")
# bitsandbytes scales so many values together. Smaller tensors than the other number stay in float32.
BLOCK, SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class Learner:
    """A set of trained tensors.

    Attributes:
        name: prefix of its tensors in a checkpoint.
        parameters: name -> parameter.
        clip: the largest norm of all gradients together.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float = math.inf

    @property
    def moments(self) -> int:
        """Bytes of the optimiser's moments."""
        kind = "adamw" if isinstance(self.optimizer, torch.optim.AdamW) else "adamw8bit"
        return moments_size(kind, (value.numel() for value in self.parameters.values()))

    @property
    def scratch(self) -> int:
        """Temporary memory of AdamW's step in bytes: twice the largest tensor."""
        return 2 * max(value.numel() * value.element_size() for value in self.parameters.values())

    def gather(self, processes: Processes, scale: float = 1.0) -> float:
        """Average the gradients over the processes, then clip them.

        Args:
            scale: the factor that the loss was multiplied by.

        Returns:
            Their norm before clipping.
        """
        parameters = list(self.parameters.values())
        # a shard gets its mean gradient in the backward pass
        processes.average_gradients(parameter for parameter in parameters if not isinstance(parameter, Shard))
        if scale != 1:
            torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)
        return clip_gradients(parameters, self.clip)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, norm: float) -> None:
        """Make a step with the gradients. If their norm `norm` is NaN or infinite, they are discarded."""
        if math.isfinite(norm):
            self.optimizer.step()
        self.zero_grad()

    def allocate_gradients(self) -> None:
        """Allocate the gradients as zeros."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        """Discard the gradients."""
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Name in a checkpoint -> parameter or AdamW state."""
        values = {f"{self.name}.{name}": value for name, value in self.parameters.items()}
        return values | _optimizer_tensors(f"{self.name}_optimizer", self.parameters, self.optimizer)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a checkpoint."""
        for name, parameter in self.parameters.items():
            fill(parameter, tensors[f"{self.name}.{name}"])
        _load_optimizer(f"{self.name}_optimizer", self.parameters, self.optimizer, tensors)


def make_learner(
    name: str,
    parameters: dict[str, nn.Parameter],
    rate: float,
    clip: float = math.inf,
    kind: str = "adamw",
    **settings: float | tuple[float, float],
) -> Learner:
    """Create a learner with AdamW.

    Args:
        rate: the (peak) learning rate.
        kind: one of `config.OPTIMIZERS`.
        settings: other arguments of AdamW.

    Raises:
        TrainingError: bitsandbytes is missing.
    """
    if kind == "adamw8bit":
        make = import_adamw8bit()
        return Learner(name, parameters, make(parameters.values(), lr=rate, **settings), clip)
    # one tensor at a time; all at once would double the memory
    return Learner(name, parameters, torch.optim.AdamW(parameters.values(), lr=rate, foreach=False, **settings), clip)


def expert_learner(student: nn.Module, config: TrainingConfig) -> Learner:
    """The learner of the trained expert."""
    return make_learner(
        "expert",
        dict(student.named_parameters()),
        config.learning_rate,
        config.clip_norm,
        config.optimizer,
        weight_decay=config.weight_decay,
    )


def discriminator_learner(discriminator: nn.Module, config: TrainingConfig) -> Learner:
    """The learner of the discriminator, with the official code's betas."""
    return make_learner(
        "discriminator",
        dict(discriminator.named_parameters()),
        config.discriminator_learning_rate,
        config.discriminator_clip_norm or math.inf,
        config.optimizer,
        betas=(0.0, 0.999),
        weight_decay=config.discriminator_weight_decay,
    )


def import_adamw8bit() -> type[torch.optim.Optimizer]:
    """The AdamW of bitsandbytes.

    Raises:
        TrainingError: it is not installed or cannot be loaded.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise TrainingError(
            f"optimizer is adamw8bit, which needs the package bitsandbytes ({error}). Install it with "
            "`python -m pip install bitsandbytes` in ComfyUI's Python, or set optimizer to adamw."
        ) from error
    return AdamW8bit


def moments_size(kind: str, counts: Iterable[int]) -> int:
    """Bytes of the moments of tensors with so many values each."""
    return sum(
        2 * (count + 4 * -(-count // BLOCK)) if kind == "adamw8bit" and count >= SMALLEST_8BIT else 8 * count
        for count in counts
    )


def state_shapes(kind: str, shape: Shape) -> dict[str, Shape]:
    """Name -> shape of the optimiser's state of a parameter, as stored in checkpoints."""
    count = math.prod(shape)
    if kind == "adamw":
        return {"step": (), **dict.fromkeys(MOMENTS, shape)}
    if count < SMALLEST_8BIT:
        return {"step": (), **dict.fromkeys(MOMENTS_8BIT, shape)}
    # the values that the codes stand for, and the largest value of each block
    tables = {f"qmap{number}": (256,) for number in (1, 2)} | {
        f"absmax{number}": (-(-count // BLOCK),) for number in (1, 2)
    }
    return {"step": (), **dict.fromkeys(MOMENTS_8BIT, shape), **tables}


def _optimizer_tensors(
    prefix: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimiser's state by parameter names. Before the first step, this is its initial state."""
    found = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        if isinstance(optimizer, torch.optim.AdamW):
            zeros = torch.zeros((), device=parameter.device).expand(parameter.shape)
            state = {"step": torch.zeros(()), **dict.fromkeys(MOMENTS, zeros), **optimizer.state.get(parameter, {})}
        else:
            if parameter not in optimizer.state:
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
            state = {**optimizer.state[parameter], "step": torch.tensor(float(optimizer.state[parameter]["step"]))}
        found |= {f"{prefix}.{name}.{key}": _of(parameter, value) for key, value in state.items()}
    return found


def _of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A value of AdamW's state, as a shard if the parameter is one and the value is not a number."""
    return parameter.like(value) if isinstance(parameter, Shard) and value.ndim else value


def _load_optimizer(
    prefix: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Restore the optimiser's state."""
    state: dict[int, dict[str, Any]] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        start = f"{prefix}.{name}."
        found = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        for key, value in found.items():
            parts = isinstance(parameter, Shard) and value.ndim
            found[key] = parameter.part_of(value) if parts else value.clone()
        if found:
            if not isinstance(optimizer, torch.optim.AdamW):
                found["step"] = int(found["step"])
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant or a cosine decay to 0."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.scheduler == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))
