"""What a training step costs beside the plain model's forward, and where it goes, against the arithmetic.

    COMFYUI_PATH=<ComfyUI> python benchmarks/training_step.py [--side detail] [--tokens 480] [--layers 2] [--rank 128] [--repeats 5]
        [--cpu-time] [--compile]

A Wan model of Wan 2.1 1.3B's layer sizes with random weights, in the real ComfyUI. Every repeat runs the plain forward and one step of
the trainer, in turn. The step's parts are timed where the trainer calls them. The arithmetic is the number of operations of the
same parts, counted by PyTorch in the same run (matrix products and attention).

`--cpu-time` counts the CPU seconds of one thread, which stay comparable on a machine that others use too. `--compile` compiles the
blocks with torch.compile.
"""

import argparse
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from routing import TEXT_DIM, TEXT_TOKENS, device_time, noise_of, random_base, start_host
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Clock = Callable[[], float]
FORWARDS = ("student", "teacher", "target")
RECOMPUTE, BACKWARD, REST, PLAIN = "recompute", "backward", "the rest", "plain forward"


def flops_clock(counter: FlopCounterMode) -> Clock:
    return counter.get_total_flops


def count_operations() -> FlopCounterMode:
    """PyTorch's counter, with the CPU's attention kernel, which it does not know."""

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


class Parts:
    """The time (or operations) of a step's parts, each without what is timed inside it."""

    def __init__(self, clock: Clock):
        self.clock, self.spent, self._inside = clock, Counter(), [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began, _ = self.clock(), self._inside.append(0.0)
        try:
            yield
        finally:
            took, inside = self.clock() - began, self._inside.pop()
            self.spent[name] += took - inside
            self._inside[-1] += took

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


@contextmanager
def timed_parts(pack: Callable[[str], Any], trainer: Any, parts: Parts) -> Iterator[None]:
    """Inside the block, the trainer's networks, backward pass and recomputation are timed."""
    backbone, networks = pack("dcm_core.distill.backbone").Backbone, trainer.networks
    in_place, backward, going_back = backbone._in_place, torch.Tensor.backward, False

    def timed_networks() -> Any:
        made = networks()
        return type(made)(**{name: parts.timed(name, getattr(made, name)) for name in FORWARDS})

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        nonlocal going_back
        going_back = True
        with parts.part(BACKWARD):
            backward(*args, **kwargs)
        going_back = False

    @contextmanager
    def timed_in_place(self: Any, *args: Any) -> Iterator[None]:
        with ExitStack() as stack:
            if going_back:
                stack.enter_context(parts.part(RECOMPUTE))
            stack.enter_context(in_place(self, *args))
            yield

    with (
        patch.object(trainer, "networks", timed_networks),
        patch.object(torch.Tensor, "backward", timed_backward),
        patch.object(backbone, "_in_place", timed_in_place),
    ):
        yield


def make_trainer(pack: Callable[[str], Any], options: argparse.Namespace, folder: Path) -> Any:
    """A trainer on a Wan base of random weights, with one clip of one latent frame."""
    attach, run, places = (pack(f"nodes.host.{name}") for name in ("experts.attach", "training.run", "training.base"))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = random_base(options.layers, dtype)
    text = [[torch.randn(1, TEXT_TOKENS, TEXT_DIM), {}]]
    data = pack("dcm_core.distill.data.dataset").TensorDataset([noise_of(options.tokens)[0]], [text], [0], text)
    config = pack("dcm_core.distill.config").TrainingConfig(
        options.side, rank=options.rank or 0, gradient_checkpointing=not options.no_checkpointing
    )
    family = attach.require_family(model)
    config = config.for_family(family)
    places.hold(model, 0)
    backbone = places.make_backbone(model, family, config)
    if options.compile:
        for block in attach.diffusion_model(model).blocks:
            block.compile()
    expert = run.first_expert(model, family, config, None, None)
    return pack("dcm_core.distill.trainer").Trainer(backbone, data, config, expert, folder, model.load_device)


def plain_forward(trainer: Any) -> Callable[[], None]:
    """One call of the base as a sampler makes it."""
    (batch, _), *_ = trainer.batches.of_step(0)
    sigma = trainer.phases.sigmas[batch.index].to(batch.x0.device)

    @torch.inference_mode()
    def run() -> None:
        backbone = trainer.backbone
        backbone.module(
            batch.x0.to(backbone.dtype),
            1000 * sigma,
            context=batch.text.context.to(backbone.dtype),
            transformer_options=backbone.options(),
        )

    return run


def step(pack: Callable[[str], Any], trainer: Any, parts: Parts, plain: Callable[[], None]) -> None:
    """The plain forward and a step, timed."""
    parts.timed(PLAIN, plain)()
    with timed_parts(pack, trainer, parts):
        parts.timed(REST, trainer._training_step)()


def report(operations: Counter, times: list[Counter], options: argparse.Namespace) -> None:
    """Print each part beside the plain forward of the same repeat, and the sum."""
    rows = [*FORWARDS, RECOMPUTE, BACKWARD, REST]
    print(
        f"\n{options.side} step, {options.tokens} tokens, {options.layers} layers, rank {options.rank}, {len(times)} repeats"
    )
    print(f"plain forward: median {median(found[PLAIN] for found in times):.3f} s\n")
    print(
        f"{'part':10}{'arithmetic / plain':>20}{'measured / plain, median [least, most]':>42}{'measured / arithmetic':>24}"
    )

    def line(name: str, parts: list[str]) -> None:
        ideal = sum(operations[part] for part in parts) / operations[PLAIN]
        ratios = [sum(found[part] for part in parts) / found[PLAIN] for found in times]
        spread = f"{median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:10}{ideal:20.3f}{spread:>42}" + (f"{median(ratios) / ideal:24.3f}" if ideal else ""))

    for name in rows:
        line(name, [name])
    line("the step", rows)


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("semantic", "detail"), default="semantic")
    parser.add_argument("--tokens", type=int, default=480)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="CPU only: count the CPU seconds of one thread")
    options = parser.parse_args()
    pack = start_host()
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else device_time
    if options.cpu_time:
        torch.set_num_threads(1)
    compat = pack("nodes.host.compat")
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad(), compat.gradients():
        trainer = make_trainer(pack, options, Path(folder))
        plain = plain_forward(trainer)
        with count_operations() as counter:
            counted = Parts(flops_clock(counter))
            step(pack, trainer, counted, plain)
        step(pack, trainer, Parts(clock), plain)
        times = []
        for _ in range(options.repeats):
            step(pack, trainer, parts := Parts(clock), plain)
            times.append(parts.spent)
    report(counted.spent, times, options)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    print(f"\n{device}; torch {torch.__version__}; Python {platform.python_version()}")


if __name__ == "__main__":
    main()
