"""What routing costs: 6 routed steps against the plain base model's, and against what core alone offers.

    COMFYUI_PATH=<ComfyUI> python benchmarks/routing.py [--tokens 480 2000] [--layers 2] [--steps 6] [--repeats 3] [--cpu-time]

A Wan model of Wan 2.1 1.3B's layer sizes with random weights, and a detail expert of the release's shape (rank 128 on both
attentions, its own condition embedder and head), in the real ComfyUI. The workflows, interleaved:

- plain: the base model alone; every ratio is over it, within the same repeat
- routed: DCMAttachExperts' MODEL
- two samplers: sigmas split at the boundary, the second sampler's MODEL with the expert as core's LoRA
- hook LoRA: the expert as core's LoRA hook on the conditioning, with keyframes 0 and 1 at the boundary

The last lines count what a detail step launches (matrix products, copies; kernels on a GPU), plain and routed, and give the routed
step over its arithmetic: the operations of a plain step and of the expert's products.

A run begins and ends with its first MODEL in place, as when it is queued again and again. Few layers weigh the embedders more than the
model's 30 do, in time and even more in weights; `--layers 30` is the whole model. `--cpu-time` counts the CPU seconds of one
thread, which stay comparable on a machine that others use too.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DIM, FFN, HEADS, TEXT_DIM, TEXT_TOKENS = 1536, 8960, 12, 4096, 512  # Wan 2.1 1.3B
RANK, SCALE, BOUNDARY = 128, 2.0, 0.979  # the release
REPLACED = ("time_embedding.", "time_projection.", "text_embedding.", "head.head.")
BASE, ROUTED = "plain", "routed"
# operation -> what it is counted as
COUNTED = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"), "matrix products"),
    **dict.fromkeys(("aten::copy_", "aten::cat"), "copies"),
    **dict.fromkeys(("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"), "kernels"),
}

Clock = Callable[[], float]
Stage = tuple[Any, list, str]  # MODEL, positive conditioning, part of the sigmas: "all", "semantic" or "detail"


def start_host() -> Callable[[str], Any]:
    """Import ComfyUI and the pack in this process; returns the pack's importer: pack("nodes.host.experts.attach")."""
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("COMFYUI_PATH names no ComfyUI. Set it to a ComfyUI folder.")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    argv, sys.argv = sys.argv, ["main.py"] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = argv
    logging.disable(logging.INFO)
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(
        "dcm_pack", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["dcm_pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda name: importlib.import_module(f"dcm_pack.{name}")


def random_base(layers: int, dtype: torch.dtype) -> Any:
    """A MODEL with random weights, loaded as the host loads a file."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.wan.model import WanModel

    shapes = WanModel(
        dim=DIM,
        ffn_dim=FFN,
        num_heads=HEADS,
        num_layers=layers,
        text_dim=TEXT_DIM,
        operations=comfy.ops.disable_weight_init,
        device="meta",
        dtype=dtype,
    ).state_dict()
    weights = {
        name: (torch.randn(tensor.shape) * 0.7 / tensor[0].numel() ** 0.5).to(dtype) for name, tensor in shapes.items()
    }
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


def random_expert(pack: Callable[[str], Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Any:
    """A detail expert with the tensors of the release's."""
    experts = pack("dcm_core.experts.expert")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype) * 0.7 / shape[-1] ** 0.5

    sites = [
        name.removesuffix(".weight") for name in shapes if name.endswith(tuple(f"attn.{p}.weight" for p in "qkvo"))
    ]
    pairs = {site: (experts.LowRank(random(RANK, DIM), 0.2 * random(DIM, RANK), SCALE),) for site in sites}
    return experts.Expert(
        "wan",
        "detail",
        pairs,
        {name: random(*shape) for name, shape in shapes.items() if name.startswith(REPLACED)},
        boundary=BOUNDARY,
    )


def make_workflows(pack: Callable[[str], Any], base: Any, dtype: torch.dtype) -> dict[str, list[Stage]]:
    """Name -> the samplers of the workflow, in order."""
    import comfy.hooks
    import comfy.sd

    attach, experts = pack("nodes.host.experts.attach"), pack("dcm_core.experts.expert")
    shapes = attach.module_shapes(base)
    expert = random_expert(pack, shapes, dtype)
    tensors, _ = experts.expert_to_state_dict(expert, shapes)
    lora, _ = comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0.0)

    # core's "set" patches ignore a keyframe's strength, differences follow it
    own = base.model.diffusion_model.state_dict()
    differences = {name: tensor - own[name] for name, tensor in expert.replaced.items()}
    tensors, _ = experts.expert_to_state_dict(dataclasses.replace(expert, replaced={}, diff=differences), shapes)
    hooks = comfy.hooks.create_hook_lora(tensors, 1.0, 0.0)
    shift = base.get_model_object("model_sampling").shift
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=1 - BOUNDARY / (shift - (shift - 1) * BOUNDARY)))
    hooks.set_keyframes_on_hooks(keyframes)

    text = [[torch.randn(1, TEXT_TOKENS, TEXT_DIM), {}]]
    return {
        BASE: [(base, text, "all")],
        ROUTED: [(attach.attach_experts(base, detail=expert), text, "all")],
        "two samplers": [(base, text, "semantic"), (lora, text, "detail")],
        "hook LoRA": [(base, comfy.hooks.set_hooks_for_conditioning(text, hooks), "all")],
    }


def semantic_steps(sigmas: Tensor) -> int:
    """How many steps are above the boundary."""
    return int((sigmas[:-1] >= BOUNDARY).sum())


def device_time() -> float:
    """Seconds, with the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(
    stages: list[Stage], sigmas: Tensor, noise: Tensor, clock: Clock, watch: Callable[[], None] | None = None
) -> tuple[float, list[float], Tensor]:
    """Sample; returns (seconds, seconds of every step, latent). `watch` is called in every step."""
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    comfy.model_management.load_models_gpu([stages[0][0], *stages[0][0].get_nested_additional_models()])
    marks, first = [clock()], semantic_steps(sigmas)
    parts = {"all": sigmas, "semantic": sigmas[: first + 1], "detail": sigmas[first:]}

    def callback(*_: Any) -> None:
        marks.append(clock())
        if watch:
            watch()

    latent, sampler = torch.zeros_like(noise), comfy.samplers.sampler_object("euler")
    for model, positive, part in stages:
        latent = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            sampler,
            parts[part],
            positive,
            positive,
            latent,
            callback=callback,
            disable_pbar=True,
            seed=1,
        )
        noise = torch.zeros_like(noise)
    comfy.model_management.load_models_gpu([stages[0][0]])
    return clock() - marks[0], [after - before for before, after in pairwise(marks)], latent


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in the host's nested patches and backups."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "weights"):
        yield from tensors_in(value.weights)


def weight_bytes(stages: list[Stage]) -> int:
    """Bytes of all weights that the workflow's MODELs hold now, on whatever device, each storage once."""
    storages = {}
    for stage in stages:
        for part in (stage[0], *stage[0].get_nested_additional_models()):
            kept = (part.patches, part.backup, part.hook_patches, part.hook_backup, part.cached_hook_patches)
            for tensor in tensors_in([list(part.model.parameters()), *kept]):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def arithmetic(tokens: int, layers: int) -> float:
    """Multiplications of a detail step over a plain one: the least that an unmerged expert can cost."""
    linears = layers * (tokens * (6 * DIM**2 + 2 * DIM * FFN) + TEXT_TOKENS * 2 * DIM**2)
    attention = layers * 2 * tokens * (tokens + TEXT_TOKENS) * DIM
    embedders = TEXT_TOKENS * (TEXT_DIM * DIM + DIM**2)
    return 1 + layers * 2 * DIM * RANK * (6 * tokens + 2 * TEXT_TOKENS) / (linears + attention + embedders)


def launches(stages: list[Stage], sigmas: Tensor, noise: Tensor) -> Counter[str]:
    """What one detail step launches, by kind."""
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as recorded:
        run(stages, sigmas[-2:], noise, time.perf_counter)
    return Counter(COUNTED[event.name] for event in recorded.events() if event.name in COUNTED)


def noise_of(tokens: int) -> Tensor:
    """Noise of one latent frame with that many tokens (patches of 2 x 2), as near to a square as goes."""
    height = max(n for n in range(1, int(tokens**0.5) + 1) if tokens % n == 0)
    return torch.randn(1, 16, 1, 2 * height, 2 * tokens // height)


def measure(
    workflows: dict[str, list[Stage]], sigmas: Tensor, tokens: int, repeats: int, clock: Clock
) -> dict[str, tuple[int, list, Tensor]]:
    """Name -> (most bytes of weights in a step, (seconds, step seconds) of every repeat, latent)."""
    noise = noise_of(tokens)
    names, found = list(workflows), {}
    for name, stages in workflows.items():  # warm-up: one step of each side
        held: list[int] = []
        run(
            stages,
            sigmas[[0, -2, -1]],
            noise,
            clock,
            lambda held=held, stages=stages: held.append(weight_bytes(stages)),
        )
        found[name] = (max(held), [], None)
    for repeat in range(repeats):
        print(f"{tokens} tokens, repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            seconds, steps, latent = run(workflows[name], sigmas, noise, clock)
            found[name] = (found[name][0], [*found[name][1], (seconds, steps)], latent)
    return found


def report(
    found: dict[str, tuple[int, list, Tensor]],
    counts: dict[str, Counter[str]],
    sigmas: Tensor,
    tokens: int,
    layers: int,
) -> None:
    """Print the table of one number of tokens."""
    first, steps = semantic_steps(sigmas), len(sigmas) - 1
    ideal = arithmetic(tokens, layers)
    base_bytes, base_runs, _ = found[BASE]
    reference = found[ROUTED][2]
    print(
        f"\n{tokens} tokens, {layers} layers, {first} + {steps - first} steps; median [least, most] of {len(base_runs)} repeats"
    )
    print(f"by arithmetic: detail step {ideal:.3f}, run {1 + (ideal - 1) * (steps - first) / steps:.3f}")
    print(
        "{:14}{:>7}{:>23}{:>23}{:>10}{:>12}{:>8}{:>11}".format(
            "workflow", "run s", "run / plain", "detail step / plain", "switch s", "weights MB", "/ base", "vs routed"
        )
    )
    for name, (size, runs, latent) in found.items():
        pairs = list(zip(runs, base_runs, strict=True))
        totals = [own / base for (own, _), (base, _) in pairs]
        # without the first detail step, which holds the switch
        details = [
            o / b for (_, own), (_, base) in pairs for o, b in zip(own[first + 1 :], base[first + 1 :], strict=True)
        ]
        switch = median(own[first] - median(own[first + 1 :]) for _, own in runs)
        error = "" if name == BASE else f"{(latent - reference).norm() / reference.norm():.0e}"
        cells = [f"{median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]" for ratios in (totals, details)]
        print(
            f"{name:14}{median(s for s, _ in runs):7.2f}{cells[0]:>23}{cells[1]:>23}{switch:10.2f}{size / 1e6:12.1f}"
            f"{size / base_bytes:8.3f}{error:>11}"
        )
        if name == ROUTED:
            over = [ratio / ideal for ratio in details]
    print(f"routed detail step / its arithmetic: {median(over):.3f} [{min(over):.3f}, {max(over):.3f}]")
    for name, count in counts.items():
        print(f"a detail step, {name}: {', '.join(f'{number} {kind}' for kind, number in sorted(count.items()))}")


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[480, 2000])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        help="6: the release's timesteps; others (4 or more): its schedule's generic form",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="CPU only: count the CPU seconds of one thread")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: at least 4, so that each side has steps of its own")
    pack = start_host()
    from comfyui_version import __version__ as host

    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else device_time
    if options.cpu_time:
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    preset = pack("dcm_core.families").WAN.preset
    sigmas = (
        preset.sigmas
        if options.steps == len(preset.timesteps)
        else pack("dcm_core.schedule").generic_sigmas(options.steps)
    )
    with torch.inference_mode():
        workflows = make_workflows(pack, random_base(options.layers, dtype), dtype)
        for tokens in options.tokens:
            found = measure(workflows, sigmas, tokens, options.repeats, clock)
            counts = {name: launches(workflows[name], sigmas, noise_of(tokens)) for name in (BASE, ROUTED)}
            report(found, counts, sigmas, tokens, options.layers)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    print(
        f"\n{device}; {str(dtype).removeprefix('torch.')}; torch {torch.__version__}; ComfyUI {host}; Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
