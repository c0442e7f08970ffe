"""Plant faults in the shipped experts, and print what the report says of them: the tables of docs/report.md.

    COMFYUI_PATH=... python small_world/faults.py [--prompts 8] [--videos 4] [--pictures <folder>] [--tune]

With `--tune` it prints instead where the search ends from each of them, and what the report says of that with other noise.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import host

# isort: split
import comfy.sd
import torch
from distill import BOUNDARY, SHIFT
from ship import MODELS
from world import CAPTIONS, LATENT, embed

attach, experts = host.pack("nodes.host.experts.attach"), host.pack("nodes.host.experts.expert_files")
compare, figure = host.pack("nodes.host.evaluation.compare"), host.pack("dcm_core.evaluation.figure")
tune = host.pack("nodes.host.evaluation.tune")
tensor_file = host.pack("dcm_core.files.tensor_file")

STEPS, REFERENCE_STEPS, SEED = 6, 50, 9000
BUDGET = 4000
# of the motion; and between the sigmas where the last two steps start
SLOW, LAST = 0.6, 0.5


class World:
    """The shipped models, loaded once."""

    def __init__(self) -> None:
        def weights(kind: str, name: str) -> dict[str, torch.Tensor]:
            return tensor_file.TensorFile(MODELS / kind / f"zz_dcm_small_world_{name}.safetensors").read_all()

        options = {"dtype": torch.float32}
        self.base = comfy.sd.load_diffusion_model_state_dict(weights("diffusion_models", "base"), model_options=options)
        self.vae = comfy.sd.VAE(sd=weights("vae", "vae"))
        self.experts = {
            side: experts.read_expert_file(MODELS / "loras" / f"zz_dcm_small_world_{side}.safetensors", side, self.base)
            for side in ("semantic", "detail")
        }

    def model(self, semantic: float = 1.0, detail: float = 1.0, boundary: float = BOUNDARY) -> Any:
        """The base with both experts at these strengths."""
        return attach.attach_experts(
            self.base,
            self.experts["semantic"],
            self.experts["detail"],
            semantic_strength=semantic,
            detail_strength=detail,
            boundary=boundary,
        )

    def task(self, prompts: int, videos: int, seed: int = SEED) -> Any:
        """So many captions, spread over all of them, and so many videos of each."""
        chosen = CAPTIONS[:: len(CAPTIONS) // prompts][:prompts]
        positives = [[[embed(caption)[None].float(), {}]] for caption in chosen]
        return compare.Task(positives, None, {"samples": torch.zeros(videos, *LATENT)}, seed, 1, self.vae)


def slowed(model: Any, factor: float) -> Any:
    """MODEL whose last estimate has its motion scaled: each frame of the latent is moved towards the mean of all."""

    def slow(args: dict[str, Any]) -> torch.Tensor:
        found = args["denoised"]
        return torch.lerp(found.mean(2, keepdim=True), found, factor) if float(args["sigma"].max()) < LAST else found

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(slow)
    return clone


# Name -> settings of `World.model`.
FAULTS: dict[str, dict[str, float]] = {
    "none": {},
    "detail strength 0.6": {"detail": 0.6},
    "semantic strength 0.6": {"semantic": 0.6},
    "boundary 0.1 too low": {"boundary": BOUNDARY - 0.1},
    "boundary 0.11 too high": {"boundary": BOUNDARY + 0.11},
}


def search(world: World, prompts: int, videos: int) -> None:
    """Search from each fault, and compare what is found with other noise."""
    reference = compare.reference_of(world.base, None, 1.0, REFERENCE_STEPS, SHIFT)
    task, other = (dataclasses.replace(world.task(prompts, videos, seed), vae=None) for seed in (SEED, SEED + 1000))
    searched, ways = tune.Searched(), None
    for name, fault in FAULTS.items():
        strengths = {side: fault.get(side, 1.0) for side in world.experts}
        boundary = fault.get("boundary", BOUNDARY)
        start = tune.Start(world.experts, strengths, boundary, True, "DCM grid", STEPS, SHIFT, 1.0)
        tuner, _ = tune.make_tuner(world.base, start, reference, task, searched, tune.STEPS)
        found = tune.tune(tuner, BUDGET)
        print(f"\n{name}\n{found}", flush=True)
        best = {side: found.strengths[f"{side}_strength"] for side in world.experts}
        for title, settings in (("at the start", fault), ("found", {**best, "boundary": found.boundary})):
            candidate, _ = compare.with_schedule(world.model(**settings), "DCM grid", STEPS, SHIFT, 1.0)
            ways = ways or compare.run_reference(reference, other, candidate.levels, int)
            report = compare.compare(candidate, reference, other, ways=ways)
            print(f"  {title}: energy distance {report.sets[0].value}, {report.findings[0]}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--videos", type=int, default=4, help="of each prompt")
    parser.add_argument("--tune", action="store_true", help="search from each fault")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of the reports")
    args = parser.parse_args()
    world = World()
    if args.tune:
        search(world, args.prompts, args.videos)
        return
    task, reference = (
        world.task(args.prompts, args.videos),
        compare.reference_of(world.base, None, 1.0, REFERENCE_STEPS, SHIFT),
    )
    ways = None
    models = {name: functools.partial(world.model, **fault) for name, fault in FAULTS.items()}
    models[f"motion scaled by {SLOW}"] = lambda: slowed(world.model(), SLOW)
    for name, make in models.items():
        candidate, _ = compare.with_schedule(make(), "DCM grid", STEPS, SHIFT, 1.0)
        ways = ways or compare.run_reference(reference, task, candidate.levels, int)
        report = compare.compare(candidate, reference, task, ways=ways)
        print(f"\n{name}\n{report}", flush=True)
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            figure.plot_report(report).save(args.pictures / f"{name}.png")


if __name__ == "__main__":
    main()
