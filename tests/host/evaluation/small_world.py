"""The shipped small world as MODELs, with faults planted in its experts."""

import sys

import torch
from safetensors.torch import load_file

from ..server import ROOT

MODELS = ROOT / "small_world" / "models"
# as small_world/distill.py trained them
SHIFT, BOUNDARY, STEPS = 3.0, 0.76, 6
# between the sigmas where the last two steps start
LAST = 0.5
PROMPTS = ("a red circle moving right", "a blue square moving up", "a yellow triangle moving left")


class SmallWorld:
    """Base and experts, loaded once."""

    def __init__(self, module):
        import comfy.sd

        self.attach = module("nodes.host.experts.attach").attach_experts
        read = module("nodes.host.experts.expert_files").read_expert_file
        weights = load_file(MODELS / "diffusion_models" / "zz_dcm_small_world_base.safetensors")
        self.base = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
        self.experts = {
            side: read(MODELS / "loras" / f"zz_dcm_small_world_{side}.safetensors", side, self.base)
            for side in ("semantic", "detail")
        }
        load = module("dcm_core.files.conditioning").load_conditioning
        folder = MODELS / "dcm_conditioning" / "zz_dcm_small_world"
        self.prompts = [load(folder / f"{prompt}.safetensors") for prompt in PROMPTS]

    def model(self, semantic=1.0, detail=1.0, boundary=BOUNDARY):
        """The base with both experts at these strengths."""
        return self.attach(
            self.base,
            self.experts["semantic"],
            self.experts["detail"],
            semantic_strength=semantic,
            detail_strength=detail,
            boundary=boundary,
        )


def latent(rows):
    return {"samples": torch.zeros(rows, 16, 5, 8, 8)}


def slowed(model, factor):
    """MODEL whose last estimate has its motion scaled: each frame of the latent is moved towards the mean of all."""

    def slow(args):
        found = args["denoised"]
        return torch.lerp(found.mean(2, keepdim=True), found, factor) if float(args["sigma"].max()) < LAST else found

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(slow)
    return clone


def judge():
    """The scripts' own measures: small_world/judge.py."""
    sys.path.append(str(ROOT / "small_world"))
    try:
        import judge

        return judge
    finally:
        sys.path.remove(str(ROOT / "small_world"))
