"""LoHa, LoKr, GLoRA, OFT, BOFT and DoRA: routed, they give what the host gives when it merges the same file at the same strength."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from ..compare import relative
from ..small_models import native_wan, stored
from .test_golden import velocity
from .test_lora_parity import NAMES, SIGMA, STYLES, host_velocity, merge, names_of

RANK, TOLERANCE = 3, 1e-6
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def read(module, tmp_path):
    """read(tensors, model, role, strength) -> the expert in a file of them."""
    read_file = module("nodes.host.experts.expert_files").read_expert_file

    def run(tensors, model, role="detail", strength=1.0, metadata=None):
        path = tmp_path / "adapter.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return read_file(path, role, model, strength=strength)

    return run


def matrix(rows, columns, scale=1.0):
    return scale * torch.randn(rows, columns) / columns**0.5


def loha(rows, columns):
    parts = {"w1_a": matrix(rows, RANK), "w1_b": matrix(RANK, columns)}
    parts |= {"w2_a": matrix(rows, RANK), "w2_b": matrix(RANK, columns, 3.0)}
    return {f"hada_{part}": tensor for part, tensor in parts.items()}


def lokr(rows, columns):
    return {"lokr_w1": matrix(4, 2), "lokr_w2": matrix(rows // 4, columns // 2, 0.3)}


def small_lokr(rows, columns, *, wide=False, whole=True):
    outer, inner = (2, 4) if wide else (4, 2)
    w1 = {"lokr_w1": matrix(outer, inner)} if whole else {"lokr_w1_a": matrix(outer, 2), "lokr_w1_b": matrix(2, inner)}
    w2 = {"lokr_w2_a": matrix(rows // outer, RANK, 0.3), "lokr_w2_b": matrix(RANK, columns // inner)}
    return w1 | w2


def tucker(rows, columns):
    core = torch.randn(RANK, RANK, 1, 1)
    return {
        "lokr_w1": matrix(4, 2),
        "lokr_t2": core,
        "lokr_w2_a": matrix(RANK, rows // 4),
        "lokr_w2_b": matrix(RANK, columns // 2),
    }


def loha_tucker(rows, columns):
    cores = {f"hada_t{index}": torch.randn(RANK, RANK, 1, 1) for index in (1, 2)}
    sides = {f"w{index}_a": matrix(RANK, rows) for index in (1, 2)} | {
        f"w{index}_b": matrix(RANK, columns) for index in (1, 2)
    }
    return cores | {f"hada_{part}": tensor for part, tensor in sides.items()}


def glora(rows, columns):
    shapes = {"a1": (columns, RANK), "a2": (RANK, columns), "b1": (rows, RANK), "b2": (RANK, columns)}
    return {f"{part}.weight": matrix(*shape, 0.4) for part, shape in shapes.items()}


def old_glora(rows, columns):
    shapes = {"a1": (RANK, columns), "a2": (columns, RANK), "b1": (RANK, columns), "b2": (rows, RANK)}
    return {f"{part}.weight": matrix(*shape, 0.4) for part, shape in shapes.items()}


def oft(rows, columns):
    return {"oft_blocks": 0.1 * torch.randn(rows // 4, 4, 4)}


def boft(rows, columns):
    return {"oft_blocks": 0.1 * torch.randn(2, rows // 4, 4, 4), "alpha": torch.tensor(1.0)}


def lora(rows, columns, up=".lora_up.weight"):
    return {up.removeprefix("."): matrix(rows, RANK, 0.3), STYLES[up].removeprefix("."): matrix(RANK, columns)}


def with_alpha(make):
    return lambda rows, columns: make(rows, columns) | {"alpha": torch.tensor(2.0)}


def with_dora(make, axis=0):
    def made(rows, columns):
        scale = 1 + 0.1 * torch.randn(*((rows, 1) if axis == 0 else (1, columns)))
        return make(rows, columns) | {"dora_scale": scale}

    return made


KINDS = {
    "loha": loha,
    "loha alpha": with_alpha(loha),
    "loha tucker": loha_tucker,
    "lokr": lokr,
    "lokr alpha": with_alpha(lokr),
    "lokr w2": small_lokr,
    "lokr w2 wide": with_alpha(lambda rows, columns: small_lokr(rows, columns, wide=True)),
    "lokr w1 w2": with_alpha(lambda rows, columns: small_lokr(rows, columns, whole=False)),
    "glora": glora,
    "glora alpha": with_alpha(glora),
    "old glora": old_glora,
    "oft": oft,
    "oft alpha": with_alpha(oft),
    "boft": boft,
    "boft rescale": lambda rows, columns: boft(rows, columns) | {"rescale": 1 + 0.1 * torch.randn(rows, 1)},
    **{f"dora {up}": with_dora(lambda rows, columns, up=up: lora(rows, columns, up)) for up in STYLES},
    "dora alpha": with_alpha(with_dora(lora)),
    "dora columns": with_dora(lora, axis=1),
    "dora loha": with_dora(loha),
    "dora lokr": with_alpha(with_dora(small_lokr)),
    "dora glora": with_dora(glora),
    "dora oft": with_dora(oft),
}
SAME_SHAPE = {"old glora"}


def joined(name, part):
    return f"{name}{part}" if part.startswith("_lora") else f"{name}.{part}"


def make_file(model, naming, kinds):
    """A file with the kinds in turn, on every matrix of the model that has a name of that naming."""
    torch.manual_seed(0)
    state, tensors, count = model.model.state_dict(), {}, 0
    for tensor, names in names_of(model).items():
        shape = tuple(state[tensor].shape)
        if naming not in names or len(shape) != 2:
            continue
        kind = kinds[count % len(kinds)]
        if kind in SAME_SHAPE and shape[0] != shape[1]:
            continue
        count += 1
        tensors |= {joined(names[naming], part): value for part, value in KINDS[kind](*shape).items()}
    assert count > 10
    return tensors


def compare(module, read, base, tensors, caplog, strength=1.0, roles=("detail", "semantic")):
    """The velocity of a file as routed detail expert and as stacked semantic one, with the host's beside it."""
    model, noise, cond = base
    attach = module("nodes.host.experts.attach")
    with caplog.at_level(logging.WARNING):
        expected = host_velocity(model, merge(model, tensors, strength), noise, cond)
    assert not [record for record in caplog.records if "not loaded" in record.message or "ERROR" in record.message]
    assert relative(expected, velocity(model, noise, SIGMA, cond)) > 1e-3
    for role in roles:
        expert = read(tensors, model, role, strength)
        routed = attach.attach_experts(model, **{role: expert, f"{role}_strength": strength}, boundary=0.9)
        assert relative(velocity(routed, noise, SIGMA, cond), expected) < TOLERANCE, role
    return expert


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(module, bases, read, caplog, kind):
    strength = 0.6 if kind in ("oft", "boft", "dora alpha", "loha alpha") else 1.0
    compare(
        module, read, bases["wan_tiny"], make_file(bases["wan_tiny"][0], "diffusion_model.", [kind]), caplog, strength
    )


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize(("name", "naming"), [(name, naming) for name, namings in NAMES.items() for naming in namings])
def test_many_kinds_in_one_file_in_every_naming(module, bases, read, caplog, name, naming, strength):
    kinds = list(KINDS)
    shift = 7 * NAMES[name].index(naming)
    tensors = make_file(bases[name][0], naming, kinds[shift:] + kinds[:shift])
    compare(module, read, bases[name], tensors, caplog, strength)


def host_rows(adapters, module, tensors, weight):
    """A weight with the host's adapter of a module in it."""
    import comfy.lora

    (patch,) = comfy.lora.load_lora(tensors, {module: "weight"}).values()
    return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), "weight")


@pytest.mark.parametrize(
    "kinds", [("loha", "loha"), ("dora alpha", "loha"), ("oft", "lokr"), ("glora", "dora columns")]
)
def test_parts_of_fused_layers_and_halves_that_change_places(module, bases, read, kinds):
    """Names of diffusers, which the host does not know for HunyuanVideo."""
    import comfy.model_management

    # a loaded model has patches in its weights
    comfy.model_management.unload_all_models()
    model, noise, cond = bases["hy_tiny"]
    attach = module("nodes.host.experts.attach")
    width = model.model.diffusion_model.hidden_size
    block = "transformer.single_transformer_blocks.0"
    state, single = model.model.state_dict(), "diffusion_model.single_blocks.0.linear1.weight"
    rows = state[single].shape[0]
    final = "diffusion_model.final_layer.adaLN_modulation.1.weight"
    torch.manual_seed(0)
    tensors, merged = {}, {single: state[single].clone(), final: None}
    for name, part, kind in (
        ("attn.to_k", slice(width, 2 * width), kinds[0]),
        ("proj_mlp", slice(3 * width, rows), kinds[1]),
    ):
        own = {
            joined(f"{block}.{name}", end): tensor for end, tensor in KINDS[kind](part.stop - part.start, width).items()
        }
        merged[single][part] = host_rows(module, f"{block}.{name}", own, state[single][part])
        tensors |= own
    own = {joined("transformer.norm_out.linear", end): t for end, t in KINDS[kinds[1]](*state[final].shape).items()}
    shift_first = torch.cat(state[final].chunk(2)[::-1])
    merged[final] = torch.cat(host_rows(module, "transformer.norm_out.linear", own, shift_first).chunk(2)[::-1])
    tensors |= own
    expected = host_velocity(model, merged, noise, cond)
    for role in ("detail", "semantic"):
        routed = attach.attach_experts(model, **{role: read(tensors, model, role)}, boundary=0.9)
        assert relative(velocity(routed, noise, SIGMA, cond), expected) < TOLERANCE


def doubled(model, module):
    """A DoRA of layer Q that doubles its weight, whatever that is."""
    (stored_weight, convert), *_ = module("nodes.host.compat").key_patches(model)[f"{Q}.weight"]
    plain = convert(stored_weight.detach()).float()
    rows, columns = plain.shape
    zeros = {f"{Q}.lora_up.weight": torch.zeros(rows, 1), f"{Q}.lora_down.weight": torch.zeros(1, columns)}
    return plain, zeros | {f"{Q}.dora_scale": 2 * plain.norm(dim=1, keepdim=True)}


@pytest.mark.parametrize("kind", ["fp8", "scaled_fp8", "quantised"])
def test_bases_of_few_bits_are_read_as_the_host_reads_them(module, read, tmp_path, kind):
    import comfy.sd

    tensors, metadata = stored(kind, native_wan(layers=1))
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    options = {"dtype": torch.float8_e4m3fn} if kind == "fp8" else {}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"), model_options=options)
        plain, lora = doubled(model, module)
        expert = read(lora, model)
    dtype = module("nodes.host.experts.attach").compute_dtype(model)
    difference = expert.diff["blocks.0.self_attn.q.weight"]
    assert difference.dtype is dtype and relative(difference, plain) < 4 * torch.finfo(dtype).eps
    original = native_wan(layers=1)["blocks.0.self_attn.q.weight"]
    assert relative(difference, original) < 0.1


def test_loras_of_the_user_do_not_count(module, read, wan):
    model = wan(layers=1)
    plain, lora = doubled(model, module)
    model.add_patches({f"{Q}.weight": ("diff", (torch.ones(256, 256),))})
    before = read(lora, model)
    model.patch_model()
    after = read(lora, model)
    model.unpatch_model()
    for expert in (before, after):
        assert relative(expert.diff["blocks.0.self_attn.q.weight"], plain) < TOLERANCE
        assert "computed from the model's own weights without LoRAs" in expert.notes[0]


def test_packed_weights_are_refused_only_where_they_are_needed(module, read, wan):
    class Packed(torch.Tensor):
        pass

    model = wan(layers=1)
    layer = model.model.diffusion_model.blocks[0].self_attn.q
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    assert len(read(named("lokr"), model).diff) == 1
    with pytest.raises(ValueError, match=r"self_attn\.q\.weight is stored as Packed\. Load the model in float16"):
        read(named("oft"), model)


def named(kind, rows=256, columns=256, module=Q):
    torch.manual_seed(0)
    return {joined(module, end): tensor for end, tensor in KINDS[kind](rows, columns).items()}


SETTINGS = {
    "semantic_lora": "none",
    "semantic_strength": 1.0,
    "detail_lora": "none",
    "detail_strength": 1.0,
    "boundary": 0.0,
}


@pytest.fixture
def save(models):
    """save(tensors) -> the name of a LoRA."""
    path = models / "loras" / "adapters.safetensors"

    def write(tensors):
        save_file(tensors, path)
        return path.name

    yield write
    path.unlink()


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_the_node_s_strength_counts(node, bases, save, side):
    """What OFT changes is not proportional to it."""
    model, noise, cond = bases["wan_tiny"]
    tensors = make_file(model, "diffusion_model.", ["oft"])
    inputs = SETTINGS | {f"{side}_lora": save(tensors), f"{side}_strength": 0.5}
    (routed,) = node("DCMAttachExperts", model=model, **inputs).result
    expected = host_velocity(model, merge(model, tensors, 0.5), noise, cond)
    assert relative(velocity(routed, noise, SIGMA, cond), expected) < TOLERANCE


def test_what_was_done_is_said(node, bases, save, caplog):
    tensors = named("loha") | named("dora alpha", module=Q[:-1] + "k") | named("oft", module=Q[:-1] + "v")
    tensors |= {f"{Q[:-1]}v.rescale": torch.ones(256, 1)} | named("lokr", module="diffusion_model.blocks.0.ffn.0")
    with caplog.at_level(logging.WARNING):
        shown = node("DCMAttachExperts", model=bases["wan_tiny"][0], **SETTINGS | {"detail_lora": save(tensors)})
    text = shown.ui.as_dict()["text"][0] if hasattr(shown.ui, "as_dict") else shown.ui["text"][0]
    assert text.splitlines() == [
        "detail expert: LoRA rank 9, 4 layers matched, strength 1",
        "  DoRA: 1 layer as full differences, computed from the model's own weights without LoRAs",
        "  LoHa: 1 layer as LoRA of rank 9",
        "  LoKr: 1 layer as full differences",
        "  OFT: 1 layer as full differences, computed from the model's own weights without LoRAs",
        "  full differences take 0.000786 GB",
        "  left out 1 tensor: rescale of OFT, which ComfyUI does not use",
        "boundary 0.979, stacked",
    ]
    assert "adapters.safetensors: LoHa: 1 layer as LoRA of rank 9" in caplog.text


def test_what_other_models_have_is_left_out(read, bases):
    lora = named("loha") | named("loha", module="text_encoder.layers.0.q")
    expert = read(lora | named("lokr", module="diffusion_model.blocks.0.cross_attn.k_img"), bases["wan_tiny"][0])
    assert len(expert.low_rank) == 1 and len(expert.notes) == 3
    assert "left out 4 tensors: text encoder LoRA" in expert.notes[2] or "left out 4 tensors" in expert.notes[1]


def without(tensors, end):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


BROKEN = {
    "another size": (named("loha", 512, 128), r"have shapes \(9, 128\) and \(512, 9\); the model's .* is \(256, 256\)"),
    "another size of a difference": (
        named("lokr", 512, 256),
        r"ComfyUI cannot apply the LoKr of .*self_attn\.q .*made for a model of another size",
    ),
    "another size of blocks": (named("oft", 100), "ComfyUI cannot apply the OFT of"),
    "a DoRA scale of another size": (
        named("dora alpha", 512),
        r"dora_scale has shape \(512, 1\); expected \(256, 1\) or \(1, 256\)",
    ),
    "a flat DoRA scale": (
        named("lokr") | {f"{Q}.dora_scale": torch.ones(256)},
        r"dora_scale has shape \(256,\); expected \(256, 1\) or \(1, 256\)",
    ),
    "alphas": (named("loha") | {f"{Q}.alpha": torch.ones(2)}, r"alpha has shape \(2,\); expected a single number"),
    "NaN": (
        {key: tensor * float("nan") for key, tensor in named("oft").items()},
        r"NaN or infinite values in 1 tensor: .*oft_blocks",
    ),
    "whole numbers": (
        {key: tensor.to(torch.int8) for key, tensor in named("loha").items()},
        "4 tensors stored as torch.int8, not as floating-point numbers",
    ),
    "a NaN DoRA scale": (
        named("lokr") | {f"{Q}.dora_scale": torch.full((256, 1), torch.inf)},
        "NaN or infinite values",
    ),
    "half a LoHa": (without(named("loha"), "w2_b"), r"self_attn\.q\.hada_w2_b is missing from its layer"),
    "half a GLoRA": (without(named("glora"), "b1.weight"), r"self_attn\.q\.b1\.weight is missing from its layer"),
    "half a LoKr": (without(named("lokr"), "w2"), "ComfyUI cannot apply the LoKr"),
    "half a small LoKr": (without(named("lokr w2"), "w1"), r"do not fit together \(.*lokr_w1_a"),
    "a LoHa without its first part": (without(named("loha"), "w1_a"), r"3 LoHa tensors .* cannot be used here"),
    "a DoRA scale alone": ({f"{Q}.dora_scale": torch.ones(256, 1)}, "1 DoRA tensor .* cannot be used here"),
    "halves that do not fit": (
        named("loha") | {f"{Q}.hada_w1_b": torch.ones(5, 256)},
        "halves do not fit each other",
    ),
    "two kinds": (named("loha") | named("lokr"), "is loha and lokr at once"),
    "LoRA too": (
        named("loha") | {f"{Q}.lora_up.weight": torch.ones(256, 2), f"{Q}.lora_down.weight": torch.ones(2, 256)},
        "at once",
    ),
    "a difference too": (
        named("oft") | {f"{Q}.diff": torch.ones(256, 256)},
        r"q\.diff and an adapter are for the same layer",
    ),
    "a replacement too": (named("loha") | {f"{Q}.set_weight": torch.ones(256, 256)}, "is both replaced and changed"),
    "the same layer in two names": (
        named("oft") | named("oft", module="blocks.0.attn1.to_q"),
        "are for the same tensor",
    ),
    "no such layer": (named("loha", module="diffusion_model.blocks.7.self_attn.q"), r"4 of 4 tensors do not fit"),
    "a method of others": (
        named("loha") | {f"{Q[:-1]}k.ia3_l": torch.ones(256)},
        "1 IA3 tensor .* cannot be used here",
    ),
    "BOFT without alpha": (without(named("boft"), "alpha"), "ComfyUI cannot apply the BOFT .*NoneType"),
    "LoKr that the host cannot compute": (
        {joined(Q, end): tensor for end, tensor in tucker(256, 256).items()},
        "ComfyUI cannot apply the LoKr .*view size",
    ),
}


@pytest.mark.parametrize("tensors, message", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_refused(module, read, bases, tensors, message):
    attach, model = module("nodes.host.experts.attach"), bases["wan_tiny"][0]
    with pytest.raises(ValueError, match=message):
        attach.attach_experts(model, detail=read(tensors, model))


def test_other_mistakes_are_found_before_the_work(module, read, bases, monkeypatch):
    adapters = module("nodes.host.experts.adapters")
    monkeypatch.setattr(adapters, "_difference", lambda *_: pytest.fail("computed"))
    for extra, metadata, message in (
        ({"stranger.lora_A": torch.ones(2, 2)}, None, "1 of 2 tensors do not fit"),
        (named("lokr", 512, module=Q[:-1] + "v"), None, "ComfyUI cannot apply the LoKr of .*self_attn.v"),
        (named("dora alpha", 256, 128, Q[:-1] + "v"), None, "ComfyUI cannot apply the DoRA of .*self_attn.v"),
        ({}, {"dcm.family": "hunyuan_video"}, "is for HunyuanVideo"),
        ({}, {"dcm.expert": "semantic"}, "is a semantic expert"),
    ):
        with pytest.raises(ValueError, match=message):
            read(named("oft") | extra, bases["wan_tiny"][0], metadata=metadata)


def test_too_little_memory_is_named(read, bases, monkeypatch):
    import comfy.model_management

    model, tensors = bases["wan_tiny"][0], named("oft") | named("lokr", module="diffusion_model.blocks.0.ffn.0")
    # twice two layers of 256 x 256 values of 4 bytes
    needed = 2 * 2 * 256 * 256 * 4
    free = needed
    memory = comfy.model_management
    monkeypatch.setattr(
        memory, "get_free_memory", lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free
    )
    read(tensors, model)
    free = needed - 1
    with pytest.raises(
        ValueError, match=r"LoKr and OFT on 2 layers needs 0\.00105 GB of memory .*, but cpu has 0\.00105 GB free"
    ):
        read(tensors, model)
    assert len(read(named("loha"), model).low_rank) == 1, "a LoRA is no difference"


@pytest.mark.parametrize("logged", [True, False])
def test_too_little_device_memory_is_the_host_s_own_error(module, read, bases, monkeypatch, logged):
    import comfy.weight_adapter

    def full(*args, **kwargs):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            if not logged:
                raise
            logging.error("ERROR oft %s", error)

    monkeypatch.setattr(comfy.weight_adapter.OFTAdapter, "calculate_weight", full)
    with pytest.raises(torch.OutOfMemoryError):
        read(named("oft"), bases["wan_tiny"][0])


def test_the_host_s_errors_go_where_they_went(read, bases, caplog):
    """A file that fits is read in silence, and afterwards the log is as before."""
    read(named("oft"), bases["wan_tiny"][0])
    assert not logging.getLogger().filters
    with pytest.raises(ValueError, match="cannot apply"):
        read(named("oft", 100), bases["wan_tiny"][0])
    assert not logging.getLogger().filters
