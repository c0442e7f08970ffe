"""Small Wan models of random weights, and the ways in which their files are stored."""

import json

import torch

from dcm_core.families import WAN
from dcm_core.families.wan import IMAGE

KINDS = ["bfloat16", "fp8", "scaled_fp8", "quantised"]
FP8 = torch.float8_e4m3fn


VISION = 1280  # values per token of CLIP vision that Wan's image layers take


def native_wan(seed=0, width=256, layers=2, channels=16, vision=False, positions=0):
    """The weights of a small Wan model in the host's layout, float32.

    vision: with the image layers that see through CLIP vision. positions: of first and last frame in them, if they have any.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"patch_embedding.weight": (width, channels, 1, 2, 2), "head.modulation": (1, 2, width)}
    special = {
        "time_projection.1": (6 * width, width),
        "time_embedding.0": (width, 256),
        "text_embedding.0": (width, 4096),
        "ffn.0": (2 * width, width),
        "ffn.2": (width, 2 * width),
        "head.head": (64, width),
        "img_emb.proj.0": (VISION, VISION),
        "img_emb.proj.1": (VISION, VISION),
        "img_emb.proj.3": (width, VISION),
        "img_emb.emb_pos": (1, positions, VISION),
    }
    wanted = {"", IMAGE} if vision else {""}
    for rule in WAN.DIFFUSERS_TO_NATIVE:
        for index in range(layers if "{n}" in rule.target else 1) if rule.optional in wanted else []:
            name = rule.target.replace("{n}", str(index))
            shape = next((s for end, s in special.items() if name.endswith(end)), (width, width))
            if name.endswith("emb_pos"):
                shapes |= {name: shape} if positions else {}
            elif name.endswith("modulation"):
                shapes.setdefault(name, (1, 6, width))
            elif "norm" in name or name in ("img_emb.proj.0", "img_emb.proj.4"):
                shapes |= {f"{name}.{param}": shape[:1] for param in rule.params}
            else:
                shapes.setdefault(f"{name}.weight", shape)
                shapes.setdefault(f"{name}.bias", shape[:1])
    state_dict = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        scale = 0.05 if len(shape) == 1 else 0.7 / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        state_dict[name] = 1 + 0.05 * value if "norm" in name and name.endswith("weight") else scale * value
    return state_dict


def make_wan(**sizes):
    """A small Wan model in float32: a MODEL without experts."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(native_wan(**sizes), model_options={"dtype": torch.float32})


def linears(state_dict):
    return [name.removesuffix(".weight") for name, value in state_dict.items() if value.ndim == 2]


def scaled(state_dict, name):
    """Every linear's weight in fp8 with its scale, called `name`, beside it."""
    result = {key: value.bfloat16() for key, value in state_dict.items()}
    for module in linears(state_dict):
        weight = state_dict[f"{module}.weight"]
        scale = weight.abs().max() / 448
        result[f"{module}.weight"], result[f"{module}.{name}"] = (weight / scale).to(FP8), scale.float()
    return result


def stored(kind, state_dict):
    """(tensors, metadata) of a file."""
    if kind == "scaled_fp8":
        return {**scaled(state_dict, "scale_weight"), "scaled_fp8": torch.empty(0, dtype=FP8)}, {}
    if kind == "quantised":
        layers = {module: {"format": "float8_e4m3fn"} for module in linears(state_dict)}
        inputs = {f"{module}.input_scale": torch.ones(()) for module in layers}
        facts = {"format_version": "1.0", "layers": layers}
        return scaled(state_dict, "weight_scale") | inputs, {"_quantization_metadata": json.dumps(facts)}
    return {key: value.bfloat16() for key, value in state_dict.items()}, {}
