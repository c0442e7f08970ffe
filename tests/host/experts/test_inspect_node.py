"""DCM Inspect Model: what it says and draws of files and MODELs, and that it leaves them as they are."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcm_core.families import FAMILIES

from ..server import failure

SHIPPED = Path(__file__).parents[3] / "small_world" / "models"
PAIRS = {"wan_tiny": "wan", "hy_tiny": "hunyuan_video"}
STACKED, INDEPENDENT = "detail on top of semantic (as released)", "independent, each on its side"


@pytest.fixture
def folder(models):
    """models/<kind> folders; files a test adds are removed after it."""
    kinds = ("diffusion_models", "loras")
    before = {path for kind in kinds for path in (models / kind).rglob("*")}
    yield models
    for path in {path for kind in kinds for path in (models / kind).rglob("*")} - before:
        if path.is_file():
            path.unlink()


@pytest.fixture
def look(node):
    """look(file="none", model=None) -> (facts by name, number of pictures); with both, the facts of both in lists."""

    def run(file="none", model=None):
        output = node("DCMInspectModel", file=file, model=model)
        text, plot = output.result
        assert plot.ndim == 4 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
        assert output.ui["text"] == (text,) and len(output.ui["images"]) == len(plot)
        facts = [dict(line.strip().split(": ", 1) for line in part.splitlines()) for part in text.split("\n\n")]
        return (facts[0] if len(facts) == 1 else facts), len(plot)

    return run


@pytest.fixture
def converted(node, releases, folder):
    """converted(name): a release as base and expert files called <name>_base and <name>_expert."""

    def run(name):
        node(
            "DCMConvertCheckpoint",
            model_name=releases[name],
            base_name=f"{name}_base",
            expert_name=f"{name}_expert",
            dtype="keep",
            overwrite=True,
        )

    return run


def load(node, name, weight_dtype="default"):
    return node("DCMLoadModel", model_name=name, weight_dtype=weight_dtype).result[0]


def attach(node, model, **changes):
    settings = {
        "semantic_lora": "none",
        "semantic_strength": 1.0,
        "detail_lora": "none",
        "detail_strength": 1.0,
        "boundary": 0.0,
    }
    return node("DCMAttachExperts", model=model, **settings | changes).result[0]


@pytest.mark.parametrize("name", PAIRS)
def test_a_release_and_the_model_it_becomes_say_the_same(node, look, releases, name):
    family = FAMILIES[PAIRS[name]]
    file, pictures = look(f"diffusion_models/{releases[name]}")
    assert (file["family"], file["experts"], pictures) == (family.title, "semantic, detail", 1)
    assert "problem" not in file
    model, pictures = look(model=load(node, releases[name]))
    assert (model["family"], float(model["boundary"]), pictures) == (family.title, family.preset.boundary, 1)
    assert model["experts"] == "detail (stacked, detail on top of semantic)"
    assert model["detail"].endswith("strength 1") and "rank 8" in model["detail"]
    assert model["LoRAs"] == "none"
    assert "%" in file["change"] and model["change"] == file["change"]


@pytest.mark.parametrize("name", PAIRS)
def test_an_expert_file_alone_and_beside_its_base(node, look, releases, converted, name):
    converted(name)
    expert = f"loras/{name}_expert.safetensors"
    alone, _ = look(expert)
    assert (alone["experts"], alone["rank"], "fit model" in alone) == ("detail", "8", False)
    assert "detail norm" in alone["change"] and "without a plain base" in alone["not shown"]
    (file, model), pictures = look(expert, load(node, f"{name}_base.safetensors"))
    assert file["fit model"] == file["known keys"] == f"{alone['tensors'].split()[0]} of {alone['tensors'].split()[0]}"
    assert "not shown" not in file
    assert file["change"] == look(f"diffusion_models/{releases[name]}")[0]["change"], "as in the release"
    assert (model["experts"], pictures) == ("none attached", 1)
    assert look(expert, load(node, releases[name]))[1] == 2, "the file's expert and the model's"


@pytest.fixture
def small_world(folder):
    """The shipped base and experts among the host's models."""
    for path in SHIPPED.glob("*/zz_dcm_small_world_*.safetensors"):
        if (folder / path.parent.name).is_dir():
            shutil.copy(path, folder / path.parent.name)
    return {
        "semantic_lora": "zz_dcm_small_world_semantic.safetensors",
        "detail_lora": "zz_dcm_small_world_detail.safetensors",
    }


def test_both_experts_stacked_and_independent(node, look, small_world):
    base = load(node, "zz_dcm_small_world_base.safetensors")
    changes = []
    for how, said in ((STACKED, "stacked"), (INDEPENDENT, "independent")):
        facts, _ = look(
            model=attach(node, base, semantic_strength=0.5, detail_strength=-2.0, experts=how, **small_world)
        )
        assert facts["experts"].startswith(f"semantic and detail ({said}")
        assert facts["semantic"].endswith("strength 0.5") and facts["detail"].endswith("strength -2")
        assert facts["boundary"] == "0.76" and facts["timesteps"].startswith("[1000.0, ")
        assert facts["LoRAs"] == "none", "a stacked semantic expert is none of the user's"
        changes.append(facts["change"])
    assert changes[0] == changes[1] and "semantic" in changes[0] and "detail" in changes[0]


def test_a_stacked_expert_is_measured_with_its_scale(module, wan, random_expert):
    """Its alpha is not its rank; stacked or routed, it changes the base as much."""
    inspect, attach, base = module("nodes.host.experts.inspect"), module("nodes.host.experts.attach"), wan()
    expert, found = random_expert(base, "semantic", replaced=False), []
    for stacked in (True, False):
        model = attach.attach_experts(base, expert, stacked=stacked)
        changes = inspect.model_changes(model, model.get_attachment("dcm"), module("dcm_core.families").WAN)["semantic"]
        found.append({change.name: change.norm for change in changes})
    update = expert.low_rank["blocks.0.self_attn.q"][0]
    assert found[0]["blocks.0.self_attn.q.weight"] == pytest.approx(
        (update.scale * update.up @ update.down).norm().item(), rel=1e-4
    )
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def share(facts, side):
    """The average change of one expert."""
    words = next(part for part in facts["change"].split("; ") if part.startswith(side))
    return float(words.split()[1].removesuffix("%"))


def test_changes_are_shown_at_their_strength(node, look, small_world):
    base = load(node, "zz_dcm_small_world_base.safetensors")
    full, half, none = (
        look(model=attach(node, base, semantic_strength=s, detail_strength=s, **small_world))[0]
        for s in (1.0, 0.5, 0.0)
    )
    for side in ("semantic", "detail"):
        assert share(half, side) == pytest.approx(share(full, side) / 2, rel=0.01)
        assert none[side].endswith("strength 0")
    assert "change" not in none


def test_a_strength_of_a_replaced_layer_in_a_semantic_expert_that_is_stacked(node, look, wan, module, random_expert):
    attach_experts = module("nodes.host.experts.attach").attach_experts
    model = wan()
    expert = random_expert(model, "semantic")
    whole, half = (look(model=attach_experts(model, expert, semantic_strength=s))[0] for s in (1.0, 0.5))
    assert share(half, "semantic") == pytest.approx(share(whole, "semantic") / 2, rel=0.01)


def test_a_plain_model_and_its_loras(node, look, small_world):
    import comfy.sd

    base = load(node, "zz_dcm_small_world_base.safetensors")
    facts, pictures = look(model=base)
    assert (facts["family"], facts["experts"], facts["LoRAs"], pictures) == ("Wan 2.1", "none attached", "none", 1)
    assert "change" not in facts and "computes in" in facts["dtypes"]
    lora = load_file(SHIPPED / "loras" / small_world["semantic_lora"])
    patched, _ = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)
    count = len(patched.patches)
    assert count == 177, "all tensors of a full fine-tune"
    for model in (patched, attach(node, patched, **small_world)):
        assert look(model=model)[0]["LoRAs"] == f"{count} other patches on {count} tensors"


def test_patches_in_the_weights_do_not_count_as_the_base(node, look, small_world):
    """While a model is loaded its LoRAs are in its weights; the host keeps the originals aside."""
    import comfy.model_management as management

    model = attach(node, load(node, "zz_dcm_small_world_base.safetensors"), **small_world)
    before, _ = look(model=model)
    management.load_models_gpu([model, *model.get_additional_models()])
    try:
        assert model.backup, "nothing was patched"
        assert look(model=model)[0] == before
    finally:
        management.unload_all_models()


def test_nothing_is_loaded_moved_or_changed(node, look, small_world):
    import comfy.model_management as management

    management.unload_all_models()
    model = attach(node, load(node, "zz_dcm_small_world_base.safetensors"), **small_world)
    tensors = dict(model.model.named_parameters())
    before = {name: (id(tensor), tensor.data_ptr(), tensor.device, tensor.clone()) for name, tensor in tensors.items()}
    patches = model.patches_uuid
    look("loras/zz_dcm_small_world_detail.safetensors", model)
    assert not management.current_loaded_models
    assert model.patches_uuid == patches and not model.backup
    for name, tensor in model.model.named_parameters():
        identity, pointer, device, value = before[name]
        assert (id(tensor), tensor.data_ptr(), tensor.device) == (identity, pointer, device)
        assert torch.equal(tensor, value)


def test_quantised_bases_give_norms(node, look, releases, module):
    fp8 = load(node, releases["wan_tiny"], "fp8_e4m3fn")
    facts, _ = look(model=fp8)
    assert "float8_e4m3fn" in facts["dtypes"]
    assert "detail norm" in facts["change"] and "without a plain base" in facts["not shown"]

    class Packed(torch.Tensor):
        """A weight that is no plain tensor, as GGUF's."""

    model = load(node, releases["wan_tiny"])
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
    facts, _ = look(model=model)
    assert "Packed x 1" in facts["dtypes"] and "detail norm" in facts["change"]


def test_an_expert_of_another_family_beside_a_model(node, look, releases, converted):
    converted("hy_tiny")
    (file, model), _ = look("loras/hy_tiny_expert.safetensors", load(node, releases["wan_tiny"]))
    assert file["fit model"] == "none: the expert is for HunyuanVideo, but the model is Wan 2.1"
    assert file["family"] == "HunyuanVideo" and model["family"] == "Wan 2.1"
    assert "detail norm" in file["change"], "measured by itself"


def test_an_expert_of_another_size_beside_a_model(node, look, releases, small_world):
    (file, _), _ = look("loras/zz_dcm_small_world_detail.safetensors", load(node, releases["wan_tiny"]))
    assert "another size: diffusion_model." in file["fit model"]
    assert "detail norm" in file["change"]


def test_a_model_of_no_family(node, look, wan, small_world, monkeypatch, module):
    monkeypatch.setattr(module("nodes.host.experts.inspect"), "model_family", lambda model: None)
    (file, model), _ = look("loras/zz_dcm_small_world_detail.safetensors", wan())
    assert "the model is WAN21" in file["fit model"] and model["family"] == "unknown"


def test_files_that_are_something_else(look, folder, recipe):
    save_file({"a": torch.ones(2)}, folder / "loras" / "other.safetensors")
    facts, pictures = look("loras/other.safetensors")
    assert (facts["layout"], facts["family"], pictures) == ("something else", "unknown", 1)
    half = recipe.release("wan_tiny")
    del half["proj_out_lora.bias"]
    save_file(half, folder / "diffusion_models" / "half.safetensors")
    facts, _ = look("diffusion_models/half.safetensors")
    assert "1 tensor is missing (proj_out_lora.bias)" in facts["problem"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pickle.ckpt", b"PK\x03\x04" + b"0" * 40, r"pickle\.ckpt is a PyTorch pickle"),
        ("empty.safetensors", b"", "not a complete safetensors file .* Download it again"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_broken_files(look, folder, name, data, message):
    (folder / "loras" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        look(f"loras/{name}")


def test_a_file_that_is_not_there(look):
    with pytest.raises(
        ValueError,
        match=r"file is 'gone\.safetensors', which does not exist; expected the name of a file in models/loras",
    ):
        look("loras/gone.safetensors")
    for name in ("expert.safetensors", "", "vae/x.safetensors"):
        with pytest.raises(ValueError, match=r"expected none, or .* such as loras/my_expert\.safetensors"):
            look(name)


def test_nothing_given(look):
    with pytest.raises(ValueError, match=r"file is none and no model is connected\. Choose a file, or connect a model"):
        look()


def test_a_peft_folder_gives_the_alpha(look, folder, recipe):
    lora = {
        f"base_model.model.{k.replace('.lora1', '')}": v for k, v in recipe.release("wan_tiny").items() if ".lora_" in k
    }
    peft = folder / "loras" / "looked_at"
    peft.mkdir(exist_ok=True)
    save_file(lora, peft / "adapter_model.safetensors")
    found = []
    for alpha in (8, 24):
        (peft / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}, "r": 8}}')
        facts, _ = look("loras/looked_at/adapter_model.safetensors")
        found.append(float(facts["change"].split()[2]))
    assert found[1] == pytest.approx(3 * found[0], rel=0.01)


def test_the_choice_and_when_the_file_changed(node, folder, releases):
    cls = node.classes["DCMInspectModel"]
    save_file({"a": torch.ones(2)}, folder / "loras" / "x.safetensors")
    options = cls.define_schema().inputs[0].options
    assert options[0] == "none"
    assert {"loras/x.safetensors", f"diffusion_models/{releases['wan_tiny']}"} <= set(options)
    assert cls.fingerprint_inputs("loras/x.safetensors") > cls.fingerprint_inputs("none") == ()


def test_work_on_a_file_can_be_interrupted(look, releases):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        look(f"diffusion_models/{releases['wan_tiny']}")


def test_in_a_server_text_and_picture_are_the_nodes_output(server):
    release = "dcm_wan2.1_t2v_1.3B.safetensors"
    graph = {
        "1": {"class_type": "DCMLoadModel", "inputs": {"model_name": release, "weight_dtype": "default"}},
        "2": {"class_type": "DCMInspectModel", "inputs": {"file": f"diffusion_models/{release}", "model": ["1", 0]}},
    }
    output = server.run(graph)["outputs"]["2"]
    assert "family: Wan 2.1" in output["text"][0] and "model: WAN21" in output["text"][0]
    assert [(image["type"], image["filename"].endswith(".png")) for image in output["images"]] == [("temp", True)] * 2
    graph["2"]["inputs"] = {"file": "none"}
    error = failure(server.run(graph))
    assert error["node_id"] == "2" and "Choose a file, or connect a model" in error["exception_message"]
