"""Distil the small world's base into experts: the pair that is shipped, and the paper's ablation at equal budgets.

    COMFYUI_PATH=... python small_world/distill.py <folder with the base> [run ...]

Two runs at a time, each on one thread (`--at-once`): with more threads numbers are added up in another order. Runs that are done are
passed over; an interrupted one goes on where it stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from host import pack

# isort: split
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor
from world import CAPTIONS, LATENT, embed

config_module, dataset = pack("dcm_core.distill.config"), pack("dcm_core.distill.data.dataset")
tensor_file, writing = pack("dcm_core.files.tensor_file"), pack("dcm_core.files.writing")
training = pack("nodes.host.training.run")
sampling, schedule = pack("nodes.host.sampling.run"), pack("dcm_core.schedule")

# Six steps of this schedule start at the solver points 1, .94, .86 | .75, .61, .40: each is a phase of its own, three for each
# expert. The last step is the hardest: with a larger shift it is longer, and what is lost there is lost for good.
SHIFT, BOUNDARY = 3.0, 0.76
PHASES = 3

# What the semantic expert is asked for most it learns best: the three levels where its steps start. More of it, or any for the detail
# expert, brings the spectrum closer and latents further away (docs/small-world-trials.md).
# No guidance: a base of this size needs little, and an expert of this size learns it badly (docs/small-world-trials.md).
SEMANTIC = config_module.TrainingConfig(
    "semantic",
    steps=4500,
    batch_size=8,
    rank=0,
    learning_rate=2e-4,
    scheduler="cosine",
    warmup_steps=50,
    ema_decay=0.95,
    boundary=BOUNDARY,
    shift=SHIFT,
    phases=PHASES,
    entry_share=0.5,
    cfg=0.0,
    gradient_checkpointing=False,
    save_every=400,
    keep=1,
)
# The semantic expert is a full fine-tune, its feed-forward layers fit high noise only: here they need a LoRA, too.
# The paper's adversarial weight of 0.1 brings the spectrum closer, but pixels and latents further away (docs/small-world-trials.md).
DETAIL = replace(
    SEMANTIC,
    side="detail",
    entry_share=0.0,
    steps=4500,
    rank=64,
    alpha=128.0,
    every_linear=True,
    learning_rate=3e-4,
    adversarial_weight=0.06,
    discriminator_learning_rate=1e-4,
    discriminator_width=256,
)


@dataclass(frozen=True)
class Plan:
    """One expert to train; `semantic` names the run of the semantic expert under it."""

    config: Any
    semantic: str | None = None


CONSISTENCY = {"temporal_weight": 0.0, "adversarial_weight": 0.0}

# The pair that is shipped, and with it the paper's ablation, each line of which has the same number of updates. The longest chain of
# runs comes first, so that side by side they end together.
RUNS = {
    "semantic": Plan(SEMANTIC),
    "detail": Plan(DETAIL, "semantic"),
    "one_expert": Plan(replace(SEMANTIC, **CONSISTENCY, steps=SEMANTIC.steps + DETAIL.steps, shared=True)),
    "semantic_by_consistency": Plan(replace(SEMANTIC, **CONSISTENCY)),
    "detail_by_consistency": Plan(replace(DETAIL, **CONSISTENCY), "semantic_by_consistency"),
    "detail_without_gan": Plan(replace(DETAIL, adversarial_weight=0.0), "semantic"),
}

# The experts learn from the base's own videos: where they are is where the experts will work.
VIDEOS_PER_CAPTION, TEACHER_STEPS = 48, 50
# the host's cfg that equals the teacher's
GUIDANCE = 1 + SEMANTIC.cfg


def load_base(folder: Path) -> Any:
    """The base as the host loads it, in float32."""
    file = tensor_file.TensorFile(folder / "base.safetensors")
    return comfy.sd.load_diffusion_model_state_dict(file.read_all(), model_options={"dtype": torch.float32})


def sample(model: Any, caption: str, noise: Tensor, steps: int, cfg: float) -> Tensor:
    """Latents as the transformer sees them, like noise, by the host's guider and Euler sampler."""
    positive = [[embed(caption)[None].float(), {}]]
    guider = sampling.make_guider(model, positive, [[torch.zeros_like(positive[0][0]), {}]], cfg)
    sigmas, sampler = schedule.generic_sigmas(steps, SHIFT), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)
    return model.model.process_latent_in(out.float())


def teacher_videos(folder: Path, model: Any) -> Tensor:
    """The base's own latents, VIDEOS_PER_CAPTION of each caption in turn; kept in the folder."""
    path = folder / "teacher.safetensors"
    if not path.exists():
        found = []
        for index, caption in enumerate(CAPTIONS):
            generator = torch.Generator().manual_seed(500_000 + index)
            noise = torch.randn((VIDEOS_PER_CAPTION, *LATENT), generator=generator)
            found.append(sample(model, caption, noise, TEACHER_STEPS, GUIDANCE))
            print(f"teacher's videos: {index + 1} of {len(CAPTIONS)} captions", flush=True)
        writing.write_tensors(path, {"latents": torch.stack(found, 1).flatten(0, 1).half()}, {})
    return tensor_file.TensorFile(path).read("latents").float()


def load_data(folder: Path, model: Any, count: int | None = None) -> Any:
    """The base's own videos (the first `count`), with their captions."""
    latents = model.model.process_latent_out(teacher_videos(folder, model)[:count])
    texts = [[[embed(caption)[None].float(), {}]] for caption in CAPTIONS]
    no_text = [[torch.zeros_like(texts[0][0][0]), {}]]
    return dataset.TensorDataset(list(latents), texts, [index % len(texts) for index in range(len(latents))], no_text)


def expert_path(folder: Path, name: str) -> Path:
    """The file of a trained expert."""
    return folder / f"{name}.safetensors"


def load_expert(folder: Path, name: str, model: Any) -> Any:
    """A trained expert."""
    return pack("nodes.host.experts.expert_files").read_expert_file(
        expert_path(folder, name), RUNS[name].config.side, model
    )


def train(folder: Path, name: str, seed: int, steps: int | None) -> None:
    """One run, in this process."""
    model = load_base(folder)
    plan = RUNS[name]
    semantic = load_expert(folder, plan.semantic, model) if plan.semantic else None
    started = time.monotonic()
    config = replace(plan.config, seed=seed, steps=steps or plan.config.steps)
    result = training.train_expert(model, load_data(folder, model), config, folder / "states" / name, semantic=semantic)
    training.save_expert(expert_path(folder, name), result.expert, model)
    last = result.history[-100:]
    means = {term: sum(entry[term] for entry in last) / len(last) for term in last[-1]}
    print(f"{name}: {time.monotonic() - started:.0f} s, last losses {means}", flush=True)


def train_side_by_side(folder: Path, names: list[str], at_once: int, options: list[str]) -> None:
    """Runs in processes of one thread, each as soon as there is room and the expert under it is there."""
    waiting, working = list(names), {}
    try:
        while waiting or working:
            ready = [name for name in waiting if RUNS[name].semantic not in (*waiting, *working)]
            for name in ready[: at_once - len(working)]:
                command = [sys.executable, __file__, str(folder), name, "--at-once", "1", *options]
                working[name] = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
                waiting.remove(name)
            time.sleep(1)
            for name, process in list(working.items()):
                if process.poll() is not None:
                    del working[name]
                    if process.returncode:
                        raise SystemExit(
                            f"{name} ended with {process.returncode}; the runs that were at work can be gone on with."
                        )
    finally:
        # they save themselves
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each run, to try the script (default: as many as it is for)")
    parser.add_argument("--at-once", type=int, default=2, help="so many runs at a time (default: %(default)s)")
    args = parser.parse_args()
    # a run that is ended saves itself, however it is ended
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = [name for name in args.runs if not expert_path(args.folder, name).exists()]
    if args.at_once > 1:
        teacher_videos(args.folder, load_base(args.folder))
        options = ["--seed", str(args.seed), *(["--steps", str(args.steps)] if args.steps else [])]
        train_side_by_side(args.folder, runs, args.at_once, options)
        return
    for name in runs:
        train(args.folder, name, args.seed, args.steps)


if __name__ == "__main__":
    main()
