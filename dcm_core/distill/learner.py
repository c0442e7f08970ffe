"""Tensors under training with their AdamW: what makes a step of their gradients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoints import load_optimizer, optimizer_tensors
from .config import TrainingConfig
from .parallel import Processes

# What the loss is multiplied by where the model computes in float16: the gradients of a video are below its smallest numbers.
LOSS_SCALE = 2.0**16
# Once it was lowered, it is doubled again this often.
STEPS_TO_RESCALE = 1000


@dataclass(frozen=True)
class Learner:
    """One set of tensors.

    Attributes:
        name: of its tensors in a saved state.
        parameters: by name.
        clip: the largest norm of all gradients together.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float = math.inf

    @property
    def scratch(self) -> int:
        """Bytes that AdamW's step makes beside its state: twice the largest tensor."""
        return 2 * max(value.numel() * value.element_size() for value in self.parameters.values())

    def gather(self, processes: Processes, scale: float = 1.0) -> float:
        """Average the gradients over the processes, then clip them.

        Args:
            scale: what the loss was multiplied by.

        Returns:
            Their norm before they were clipped.
        """
        parameters = list(self.parameters.values())
        processes.average_gradients(parameters)
        if scale != 1:
            torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)
        return float(nn.utils.clip_grad_norm_(parameters, self.clip))

    def set_learning_rate(self, rate: float) -> None:
        """For the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, norm: float) -> None:
        """Step along the gradients, whose norm is given; if that is no number, they are thrown away."""
        if math.isfinite(norm):
            self.optimizer.step()
        self.forget()

    def expect(self) -> None:
        """Make room for the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def forget(self) -> None:
        """Throw the gradients away."""
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name."""
        values = {f"{self.name}.{name}": value for name, value in self.parameters.items()}
        return values | optimizer_tensors(f"{self.name}_optimizer", self.parameters, self.optimizer)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"{self.name}.{name}"])
        load_optimizer(f"{self.name}_optimizer", list(self.parameters), self.optimizer, tensors)


def make_learner(
    name: str,
    parameters: dict[str, nn.Parameter],
    rate: float,
    clip: float = math.inf,
    **settings: float | tuple[float, float],
) -> Learner:
    """A learner with AdamW.

    Args:
        rate: the (peak) learning rate.
        settings: of AdamW.
    """
    # one tensor at a time: all at once would need as much memory again
    return Learner(name, parameters, torch.optim.AdamW(parameters.values(), lr=rate, foreach=False, **settings), clip)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant, or half a cosine down to 0."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.scheduler == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))
