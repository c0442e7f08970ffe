"""What the host's own LoRA loader places completely, DCM Attach Experts places too, with the same velocity.

The files are made from the host's own key map and for every ending that its sources read, so that new ones are noticed.
"""

import inspect
import logging
import re

import pytest
import torch

from ..compare import relative
from .test_golden import velocity

RANK, SIGMA = 3, 0.5
TOLERANCE = 1e-6
# up -> down, as the host's sources pair them
STYLES = {
    ".lora_up.weight": ".lora_down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora.down.weight",
    ".lora_B": ".lora_A",
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    ".lora_B.default.weight": ".lora_A.default.weight",
}
EXTRAS = ["alpha", "lora_mid.weight", "reshape_weight"]
WHOLE = ["diff", "diff_b", "set_weight", "w_norm", "b_norm"]
# what only the host computes: see test_adapters.py
ADAPTERS = {
    "dora_scale": "DoRA",
    "oft_blocks": "OFT or BOFT",
    "rescale": "OFT or BOFT",
    **{f"{side}{index}.weight": "GLoRA" for side in "ab" for index in "12"},
    **{f"hada_{part}": "LoHa" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": "LoKr" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
}
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, *FP8]
NAMES = {
    "wan_tiny": ["lora_unet_", "diffusion_model."],
    "hy_tiny": ["lora_unet_", "diffusion_model.", "diffusion_model.*", "transformer."],
}
KINDS = [*STYLES, *EXTRAS, *WHOLE]
CASES = [("wan_tiny", "diffusion_model.", [kind]) for kind in KINDS]
# many kinds in one file, a further one for each tensor
CASES += [
    (name, naming, KINDS[shift:] + KINDS[:shift])
    for name, namings in NAMES.items()
    for naming in namings
    for shift in (0, 5, 9)
]


def host_sources():
    import comfy.lora
    import comfy.weight_adapter

    return [
        inspect.getsource(comfy.lora.load_lora),
        *(inspect.getsource(adapter.load) for adapter in comfy.weight_adapter.adapters),
    ]


def names_of(model):
    """Tensor -> the names that the host has for its module, each under the beginning of `NAMES` that it has."""
    import comfy.lora

    names = {}
    for name, tensor in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        begin = next(begin for begin in ("lora_unet_", "diffusion_model.", "transformer.") if name.startswith(begin))
        own = begin != "diffusion_model." or tensor.startswith(f"{name}.weight") or tensor == name
        assert isinstance(tensor, str) and tensor.startswith("diffusion_model.")
        names.setdefault(tensor, {})[begin if own else f"{begin}*"] = name
    return names


def test_every_naming_and_ending_of_the_host_is_tried(bases):
    for name, namings in NAMES.items():
        assert set().union(*names_of(bases[name][0]).values()) == set(namings)
    found = {ending for source in host_sources() for ending in re.findall(r'"\{\}([^"]+)"\.format\(x\)', source)}
    tried = {*STYLES, *STYLES.values(), *(f".{ending}" for ending in (*EXTRAS, *WHOLE, *ADAPTERS))}
    assert len(found) > 30 and found == tried


def merge(model, lora, strength=1.0):
    """Base tensor -> its value with a LoRA in it, as the host's loader computes it."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_management

    # a loaded model has patches in its weights
    comfy.model_management.unload_all_models()
    patches = comfy.lora.load_lora(
        comfy.lora_convert.convert_lora(lora), comfy.lora.model_lora_keys_unet(model.model, {})
    )
    state = model.model.state_dict()
    return {
        key: comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], state[key].clone(), key)
        for key, patch in patches.items()
    }


def host_velocity(model, merged, noise, cond):
    state = model.model.state_dict()
    before = {key: state[key].clone() for key in merged}
    with torch.inference_mode():
        for key, value in merged.items():
            assert value.shape == state[key].shape and not torch.equal(value, state[key]), key
            state[key].copy_(value)
        try:
            return velocity(model, noise, SIGMA, cond)
        finally:
            for key, value in before.items():
                state[key].copy_(value)


def compare(module, base, lora, caplog):
    """The velocity of a LoRA as routed detail expert and as stacked semantic one, with the host's beside it."""
    model, noise, cond = base
    attach, read = module("nodes.host.experts.attach"), module("dcm_core.experts.reader").read_expert
    family, shapes = attach.require_family(model), attach.module_shapes(model)
    with caplog.at_level(logging.WARNING):
        expected = host_velocity(model, merge(model, lora), noise, cond)
    assert not [record for record in caplog.records if "not loaded" in record.message or "ERROR" in record.message], (
        "the host places all"
    )
    assert relative(expected, velocity(model, noise, SIGMA, cond)) > 1e-4
    for role in ("detail", "semantic"):
        expert = read(lora, {}, role, family, shapes)
        routed = attach.attach_experts(model, **{role: expert}, boundary=0.9)
        assert relative(velocity(routed, noise, SIGMA, cond), expected) < TOLERANCE, role


def low_rank(shape, generator, mid=False, scale=0.3):
    """(up, down, mid or None) for a tensor, as matrices."""
    rows, columns = shape[0], max(1, torch.Size(shape[1:]).numel())
    kernel = shape[-2:] if mid and len(shape) == 5 else (1, 1)
    inner = columns // torch.Size(kernel).numel() if mid else columns
    up, down = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, inner, generator=generator)
    core = torch.randn(RANK, RANK, *kernel, generator=generator) if mid else None
    return scale * up / columns**0.5, down / RANK**0.5, core


def make_file(model, naming, kinds, dtype=torch.float32):
    """A LoRA of the kinds in turn, on every tensor that has a name of that naming (and may have that kind)."""
    generator = torch.Generator().manual_seed(0)
    state = model.model.state_dict()
    lora, taken = {}, set()
    for index, (tensor, name) in enumerate(
        (tensor, names[naming]) for tensor, names in names_of(model).items() if naming in names
    ):
        kind, shape = kinds[index % len(kinds)], tuple(state[tensor].shape)
        random = 0.02 * torch.randn(shape, generator=generator)
        bias = f"{tensor.removesuffix('.weight')}.bias"
        if tensor in taken:
            continue
        if kind in STYLES or kind in EXTRAS:
            up_name = kind if kind in STYLES else ".lora_up.weight"
            up, down, core = low_rank(shape, generator, mid=kind == "lora_mid.weight" and len(shape) > 1)
            lora |= {name + up_name: up, name + STYLES[up_name]: down}
            if core is not None:
                lora[f"{name}.lora_mid.weight"] = core
            if kind in ("alpha", "lora_mid.weight"):
                lora[f"{name}.alpha"] = torch.tensor(2.0)
            if kind == "reshape_weight":
                lora[f"{name}.reshape_weight"] = torch.tensor(shape)
        elif kind in ("diff", "w_norm", "set_weight"):
            lora[f"{name}.{kind}"] = random + state[tensor] if kind == "set_weight" else random
        elif tensor.endswith(".weight") and bias in state:
            taken.add(bias)
            lora[f"{name}.{kind}"] = 0.02 * torch.randn(state[bias].shape, generator=generator)
            if kind == "b_norm":
                lora[f"{name}.w_norm"] = random
    keep = (".alpha", ".reshape_weight")
    return {key: value if key.endswith(keep) else value.to(dtype) for key, value in lora.items()}


def case_id(value):
    return value if isinstance(value, str) else "+".join(kind.strip("._") for kind in value[:2])


@pytest.mark.parametrize(("name", "naming", "kinds"), CASES, ids=case_id)
def test_what_the_host_places_is_placed(module, bases, caplog, name, naming, kinds):
    lora = make_file(bases[name][0], naming, kinds)
    assert len(lora) > 10
    compare(module, bases[name], lora, caplog)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(module, bases, caplog, dtype):
    kinds = [".lora_up.weight", "diff", "alpha"]
    compare(module, bases["wan_tiny"], make_file(bases["wan_tiny"][0], "diffusion_model.", kinds, dtype), caplog)


@pytest.mark.parametrize("ending", ADAPTERS)
def test_what_only_the_host_computes_is_refused_by_its_name(module, bases, ending):
    model = bases["wan_tiny"][0]
    attach, read = module("nodes.host.experts.attach"), module("dcm_core.experts.reader").read_expert
    lora = {f"diffusion_model.blocks.0.self_attn.q.{ending}": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=rf"1 {ADAPTERS[ending]} tensor .* cannot be used here"):
        read(lora, {}, "detail", attach.require_family(model), attach.module_shapes(model))


def test_what_the_host_s_training_node_writes(module, bases, caplog):
    """Two-dimensional matrices also for a convolution, and differences of norms and biases."""
    import comfy.weight_adapter

    model = bases["wan_tiny"][0]
    generator, lora = torch.Generator().manual_seed(0), {}
    for key, weight in model.model.diffusion_model.state_dict(prefix="diffusion_model.").items():
        if key.endswith(".weight") and weight.ndim > 1:
            trained = comfy.weight_adapter.adapter_maps["LoRA"].create_train(weight, rank=RANK, alpha=2.0)
            stem = key.removesuffix(".weight")
            up, down = trained.lora_up.weight.detach(), trained.lora_down.weight.detach()
            lora[f"{stem}.lora_up.weight"] = 0.05 * torch.randn(up.shape, generator=generator)
            lora[f"{stem}.lora_down.weight"] = torch.randn(down.shape, generator=generator) / down.shape[1] ** 0.5
            lora[f"{stem}.alpha"] = torch.tensor(2.0)
        else:
            lora[
                f"{key.removesuffix('.weight').removesuffix('.bias')}.{'diff_b' if key.endswith('.bias') else 'diff'}"
            ] = 0.02 * torch.randn(weight.shape, generator=generator)
    assert {key: tuple(lora[key].shape) for key in lora if "patch_embedding.lora" in key} == {
        "diffusion_model.patch_embedding.lora_up.weight": (256, RANK),
        "diffusion_model.patch_embedding.lora_down.weight": (RANK, 64),
    }
    compare(module, bases["wan_tiny"], lora, caplog)


def test_one_tensor_of_a_layer_is_replaced(module, bases, caplog):
    """The other one stays the base's, or is changed."""
    state = bases["wan_tiny"][0].model.state_dict()
    generator = torch.Generator().manual_seed(0)

    def near(name):
        return state[f"diffusion_model.{name}"] + 0.05 * torch.randn(
            state[f"diffusion_model.{name}"].shape, generator=generator
        )

    lora = {
        "diffusion_model.blocks.0.self_attn.q.set_weight": near("blocks.0.self_attn.q.weight"),
        "diffusion_model.blocks.0.self_attn.k.bias.set_weight": near("blocks.0.self_attn.k.bias"),
        "diffusion_model.patch_embedding.set_weight": near("patch_embedding.weight"),
        "diffusion_model.blocks.0.norm3.set_weight": near("blocks.0.norm3.weight"),
        "diffusion_model.blocks.1.ffn.0.set_weight": near("blocks.1.ffn.0.weight"),
        "diffusion_model.blocks.1.ffn.0.diff_b": 0.1 * near("blocks.1.ffn.0.bias"),
    }
    compare(module, bases["wan_tiny"], lora, caplog)
