"""Distil the small world's base into experts: the pair that is shipped, and the paper's ablation at equal budgets.

    COMFYUI_PATH=... python small_world/distill.py <folder with vae, base and latents> [run ...]

Runs that are done are passed over; an interrupted one goes on where it stopped.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from host import pack

# isort: split
import comfy.sd
import torch
from world import CAPTIONS, embed

config_module, dataset = pack("dcm_core.distill.config"), pack("dcm_core.distill.dataset")
storage, training = pack("dcm_core.storage"), pack("nodes.host.training")

STEPS = 500
# The noise levels of a small picture are decided lower than those of a large one: shift 5 instead of 17.
SHIFT, BOUNDARY = 5.0, 0.875

SEMANTIC = config_module.TrainingConfig(
    "semantic", steps=STEPS, batch_size=8, rank=32, alpha=32.0, learning_rate=1e-3, scheduler="cosine", warmup_steps=20,
    boundary=BOUNDARY, shift=SHIFT, cfg=2.0, checkpointing=False, save_every=250, keep=1,
)
# One phase from the boundary down, and the paper's adversarial weight of 0.1, tear so small a model apart: a phase for each of
# its three steps, and a tenth of the weight.
DETAIL = replace(
    SEMANTIC, expert="detail", phases=3, rank=16, alpha=32.0, learning_rate=1e-4, discriminator_learning_rate=1e-4,
    discriminator_width=256, adversarial_weight=0.01,
)


@dataclass(frozen=True)
class Plan:
    """One expert to train; `below` names the run of the semantic expert under it."""

    config: Any
    below: str | None = None


RUNS = {
    "semantic": Plan(SEMANTIC),
    "detail": Plan(DETAIL, "semantic"),
    "detail_without_gan": Plan(replace(DETAIL, adversarial_weight=0.0), "semantic"),
    "one_expert": Plan(replace(SEMANTIC, steps=2 * STEPS, shared=True, temporal_weight=0.0)),
    "semantic_without_temporal": Plan(replace(SEMANTIC, temporal_weight=0.0)),
    "detail_on_semantic_without_temporal": Plan(replace(DETAIL, adversarial_weight=0.0), "semantic_without_temporal"),
}


def load_base(folder: Path) -> Any:
    """The base as the host loads it, in float32."""
    file = storage.TensorFile(folder / "base.safetensors")
    return comfy.sd.load_diffusion_model_state_dict(file.read_all(), model_options={"dtype": torch.float32})


def load_data(folder: Path, model: Any, count: int | None = None) -> Any:
    """The base's own training clips (the first `count`), with their captions."""
    latents = storage.TensorFile(folder / "latents.safetensors").read("latents")[:count].float()
    latents = model.model.process_latent_out(latents)
    texts = [[[embed(caption)[None].float(), {}]] for caption in CAPTIONS]
    no_text = [[torch.zeros_like(texts[0][0][0]), {}]]
    return dataset.TensorData(list(latents), texts, [index % len(texts) for index in range(len(latents))], no_text)


def load_expert(folder: Path, name: str, model: Any) -> Any:
    """A trained expert."""
    return pack("nodes.host.expert_files").read_expert_file(folder / f"{name}.safetensors", RUNS[name].config.expert, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_base(args.folder)
    data = load_data(args.folder, model)
    for name in args.runs:
        path = args.folder / f"{name}.safetensors"
        if path.exists():
            continue
        plan = RUNS[name]
        below = load_expert(args.folder, plan.below, model) if plan.below else None
        config = replace(plan.config, seed=args.seed)
        started = time.monotonic()
        result = training.train_expert(model, data, config, args.folder / "states" / name, below=below)
        training.save_expert(path, result.expert, model)
        last = result.history[-100:]
        means = {term: sum(entry[term] for entry in last) / len(last) for term in last[-1]}
        print(f"{name}: {time.monotonic() - started:.0f} s, last losses {means}", flush=True)


if __name__ == "__main__":
    main()
