"""Loading, attaching, converting, extracting and conditioning files, as a graph would run them."""

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcm_core.families import FAMILIES

from ..test_house import NODE_IDS
from .compare import relative

PAIRS = {"wan_tiny": "wan", "hy_tiny": "hunyuan_video"}
SIGMAS = [1.0, 0.99, 0.985, 0.95, 0.8, 0.0]


def text(output):
    return output.ui.as_dict()["text"][0]


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def folder(models):
    """models/<kind> folders; files a test adds are removed after it."""
    kinds = ("diffusion_models", "loras", "dcm_conditioning")
    before = {path for kind in kinds for path in (models / kind).rglob("*")}
    yield models
    for kind in kinds:
        for path in set((models / kind).rglob("*")) - before:
            if path.is_file():
                path.unlink()


@pytest.fixture(scope="module")
def velocity(recipe):
    """The denoised estimate of a golden model at one noise level, through its MODEL."""

    def run(model, name, sigma):
        import comfy.samplers

        expected = recipe.expected(name)
        context = expected["context"].float()
        extras = {}
        if "mask" in expected:
            context = context[:, : int(expected["mask"].sum())]
            extras = {"pooled_output": expected["pooled"], "guidance": 6.0}
        outputs = []
        hook = model.model.diffusion_model.register_forward_hook(
            lambda m, a, output: outputs.append(output.float().cpu())
        )

        def one(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
            denoise(expected["noise"].to(x.device), sigmas[:1].expand(len(x)), **extra_args)
            return x

        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": [[context, extras]]})
        noise = expected["noise"]
        with torch.inference_mode():
            guider.sample(
                noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(one), torch.tensor([sigma, 0.0]), seed=0
            )
        hook.remove()
        return outputs[0]

    return run


def without_experts(recipe, name):
    """The base of a golden release in plain diffusers layout."""
    family = FAMILIES[PAIRS[name]]
    return {
        key.replace(".base_layer", ""): tensor
        for key, tensor in recipe.release(name).items()
        if ".lora_" not in key and not family.detail_source(key)
    }


def in_float32(module, name):
    import comfy.sd
    import folder_paths

    return comfy.sd.load_diffusion_model(
        folder_paths.get_full_path("diffusion_models", name), model_options={"dtype": torch.float32}
    )


@pytest.mark.parametrize("name", PAIRS)
def test_converted_files_are_exact_in_the_core_loaders(node, module, releases, folder, recipe, velocity, name):
    """The base in the core loader is the semantic expert; with the core LoRA loader it becomes the detail expert."""
    out = node(
        "DCMConvertCheckpoint",
        model_name=releases[name],
        base_name="base",
        expert_name="sub/detail",
        dtype="keep",
        overwrite=False,
    )
    assert "detail expert: LoRA rank 8" in text(out)
    base = in_float32(module, "base.safetensors")
    expected = recipe.expected(name)
    family = FAMILIES[PAIRS[name]]
    high, low = family.preset.boundary, family.preset.boundary - 0.001
    assert relative(velocity(base, name, high), expected[f"probe.{round(high * 1000)}.0"]) < 1e-5

    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(folder / "loras" / "sub" / "detail.safetensors"))
    core, _ = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)
    assert relative(velocity(core, name, low), expected[f"probe.{round(low * 1000)}.0"]) < 1e-5

    attached = node(
        "DCMAttachExperts",
        model=base,
        semantic_lora="none",
        semantic_strength=1.0,
        detail_lora="sub/detail.safetensors",
        detail_strength=1.0,
        boundary=0.0,
    ).result[0]
    for sigma in (high, low):
        assert relative(velocity(attached, name, sigma), expected[f"probe.{round(sigma * 1000)}.0"]) < 1e-5
    assert attached.get_attachment("dcm").timesteps == family.preset.timesteps


def test_converting_to_another_dtype(node, releases, folder):
    node(
        "DCMConvertCheckpoint",
        model_name=releases["wan_tiny"],
        base_name="a",
        expert_name="b",
        dtype="float8_e4m3fn",
        overwrite=False,
    )
    base = load_file(folder / "diffusion_models" / "a.safetensors")
    assert base["blocks.0.ffn.0.weight"].dtype is torch.float8_e4m3fn
    assert base["blocks.0.ffn.0.bias"].dtype is torch.bfloat16
    assert base["head.head.weight"].dtype is torch.bfloat16
    assert load_file(folder / "loras" / "b.safetensors")["diffusion_model.head.head.set_weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("name", PAIRS)
def test_loader_recognises_content_not_names(node, releases, folder, recipe, name):
    assert "release, semantic base with detail expert" in text(
        node("DCMLoadModel", model_name=releases[name], weight_dtype="default")
    )
    plain = without_experts(recipe, name)
    save_file(plain, folder / "diffusion_models" / "misleading_dcm_release.safetensors")
    out = node("DCMLoadModel", model_name="misleading_dcm_release.safetensors", weight_dtype="default")
    assert "model in diffusers layout, no experts inside. Add DCM Attach Experts." in text(out)
    assert out.result[0].get_attachment("dcm") is None
    prefixed = {f"transformer.{k}": v for k, v in plain.items()}
    save_file(prefixed, folder / "diffusion_models" / "prefixed.safetensors")
    assert "diffusers layout" in text(node("DCMLoadModel", model_name="prefixed.safetensors", weight_dtype="default"))


@pytest.mark.parametrize("unmapped", [False, True], ids=["mapped", "--disable-mmap"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_release_is_read_without_a_copy_unless_the_host_is_told_so(
    node, releases, module, monkeypatch, name, unmapped
):
    import comfy.utils

    file = module("dcm_core.files.tensor_file").TensorFile
    read, original = [], file.read
    monkeypatch.setattr(file, "read", lambda self, key: read.append(key) or original(self, key))
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", unmapped)
    node("DCMLoadModel", model_name=releases[name], weight_dtype="default")
    assert bool(read) is unmapped


def test_native_and_foreign_models_pass_through(node, releases, folder):
    node(
        "DCMConvertCheckpoint",
        model_name=releases["wan_tiny"],
        base_name="native",
        expert_name="e",
        dtype="keep",
        overwrite=False,
    )
    assert "native.safetensors: plain Wan 2.1 model, no experts inside. Add DCM Attach Experts." in text(
        node("DCMLoadModel", model_name="native.safetensors", weight_dtype="default")
    )
    native = load_file(folder / "diffusion_models" / "native.safetensors")
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in native.items()}, folder / "diffusion_models" / "full.safetensors"
    )
    assert "plain Wan 2.1 model" in text(node("DCMLoadModel", model_name="full.safetensors", weight_dtype="fp8_e4m3fn"))


def broken(kind, tensors):
    tensors = dict(tensors)
    if kind == "missing":
        del tensors["blocks.0.attn1.to_q.base_layer.weight"], tensors["proj_out_lora.bias"]
    elif kind == "extra":
        tensors["blocks.0.attn1.to_z.weight"] = torch.zeros(2)
    elif kind == "half lora":
        del tensors["blocks.1.attn2.to_v.lora_B.lora1.weight"]
    elif kind == "shape":
        tensors["blocks.1.attn2.to_v.lora_B.lora1.weight"] = torch.zeros(256, 9)
    elif kind == "nan":
        tensors["proj_out_lora.weight"] = tensors["proj_out_lora.weight"] * float("nan")
    elif kind == "nan base":
        tensors["blocks.1.ffn.net.2.bias"] = tensors["blocks.1.ffn.net.2.bias"] / 0
    elif kind == "lora only":
        tensors = {k: v for k, v in tensors.items() if ".lora_" in k}
    elif kind == "both names":
        tensors |= {f"transformer.{k}": v.clone() for k, v in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"2 tensors are missing \(blocks\.0\.attn1\.to_q\.weight, proj_out_lora\.bias\)"),
        ("extra", r"1 is unknown \(blocks\.0\.attn1\.to_z\.weight\)"),
        ("half lora", r"missing \(blocks\.1\.attn2\.to_v\.lora_B\.lora1\.weight\)"),
        (
            "shape",
            r"do not fit each other: blocks\.1\.attn2\.to_v\.lora_B\.lora1\.weight\. .* has rank 9, but .*lora_A\.lora1\.weight has rank 8",
        ),
        ("nan", r"NaN or infinite values in 1 tensor: proj_out_lora\.weight"),
        ("nan base", r"has NaN or infinite values in blocks\.1\.ffn\.net\.2\.bias"),
        ("lora only", "is an expert .* Select the base model here"),
        ("both names", "with and without a prefix"),
    ],
)
def test_half_models_are_refused(node, releases, folder, recipe, kind, message):
    save_file(broken(kind, recipe.release("wan_tiny")), folder / "diffusion_models" / "broken.safetensors")
    with pytest.raises(ValueError, match=message):
        node("DCMLoadModel", model_name="broken.safetensors", weight_dtype="default")
    if kind != "lora only":
        with pytest.raises(ValueError, match=message):
            node(
                "DCMConvertCheckpoint",
                model_name="broken.safetensors",
                base_name="b",
                expert_name="e",
                dtype="keep",
                overwrite=False,
            )
    assert not files_in(folder / "loras")
    assert {path.name for path in files_in(folder / "diffusion_models")} == {"broken.safetensors", *releases.values()}


@pytest.mark.parametrize(("key", "width"), [("scale_shift_table", 257), ("patch_embedding.weight", 17)])
def test_a_size_that_only_the_model_knows(node, folder, recipe, key, width):
    """Nothing else in the file tells how wide the tensor has to be."""
    tensors = recipe.release("wan_tiny")
    tensors[key] = (
        torch.zeros(*tensors[key].shape[:-1], width) if key == "scale_shift_table" else torch.zeros(256, width, 1, 2, 3)
    )
    save_file(tensors, folder / "diffusion_models" / "wide.safetensors")
    with pytest.raises(
        ValueError,
        match=r"wide\.safetensors cannot be loaded: no Wan 2\.1 model has its sizes .*Download the file again",
    ):
        node("DCMLoadModel", model_name="wide.safetensors", weight_dtype="default")
    assert not files_in(folder / "loras")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pickle.ckpt", b"PK\x03\x04" + b"0" * 40, "PyTorch pickle"),
        ("old.ckpt", b"\x80\x02}q\x00." + b"0" * 40, "is a pickle"),
        ("empty.safetensors", b"", "not a complete safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "a web page"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("junk.safetensors", bytes(range(1, 200)), "not a complete safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(node, folder, name, data, message):
    (folder / "diffusion_models" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        node("DCMLoadModel", model_name=name, weight_dtype="default")


def test_unknown_weight_dtype(node, releases):
    with pytest.raises(ValueError, match="weight_dtype is 'fp4'; choose one of default, fp8_e4m3fn"):
        node("DCMLoadModel", model_name=releases["wan_tiny"], weight_dtype="fp4")


def test_truncated_file(node, folder, releases):
    whole = (folder / "diffusion_models" / releases["wan_tiny"]).read_bytes()
    (folder / "diffusion_models" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a complete safetensors file .* Download it again"):
        node("DCMLoadModel", model_name="cut.safetensors", weight_dtype="default")


def test_wrong_family_and_no_expert_are_refused(node, module, releases, folder):
    node(
        "DCMConvertCheckpoint",
        model_name=releases["hy_tiny"],
        base_name="hb",
        expert_name="he",
        dtype="keep",
        overwrite=False,
    )
    wan = node("DCMLoadModel", model_name=releases["wan_tiny"], weight_dtype="default").result[0]
    settings = {
        "model": wan,
        "semantic_lora": "none",
        "semantic_strength": 1.0,
        "detail_strength": 1.0,
        "boundary": 0.0,
    }
    with pytest.raises(
        ValueError,
        match=r"detail_lora is 'he\.safetensors'\. This expert is for HunyuanVideo, but the model is Wan 2\.1",
    ):
        node("DCMAttachExperts", detail_lora="he.safetensors", **settings)
    with pytest.raises(ValueError, match="both none"):
        node("DCMAttachExperts", detail_lora="none", **settings)
    with pytest.raises(
        ValueError, match=r"^semantic_lora is 'he\.safetensors', which is a detail expert\. Select it under detail_lora"
    ):
        node(
            "DCMAttachExperts",
            detail_lora="none",
            **{**settings, "semantic_lora": "he.safetensors"}
            | {"model": node("DCMLoadModel", model_name=releases["hy_tiny"], weight_dtype="default").result[0]},
        )


def test_boundary_outside_is_refused_and_nothing_is_attached(node, releases, folder):
    node(
        "DCMConvertCheckpoint",
        model_name=releases["wan_tiny"],
        base_name="b",
        expert_name="e",
        dtype="keep",
        overwrite=False,
    )
    model = node("DCMLoadModel", model_name="b.safetensors", weight_dtype="default").result[0]
    with pytest.raises(ValueError, match=r"boundary is 1\.0"):
        node(
            "DCMAttachExperts",
            model=model,
            semantic_lora="none",
            semantic_strength=1.0,
            detail_lora="e.safetensors",
            detail_strength=1.0,
            boundary=1.0,
        )
    assert model.get_attachment("dcm") is None
    assert not model.wrappers.get("apply_model")


def test_peft_folder_gives_the_alpha(node, module, releases, folder, recipe):
    lora = {
        f"base_model.model.{k.replace('.lora1', '')}": v for k, v in recipe.release("wan_tiny").items() if ".lora_" in k
    }
    peft = folder / "loras" / "trained"
    peft.mkdir(exist_ok=True)
    save_file(lora, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({"lora_alpha": 24, "r": 8}))
    files, attach = module("nodes.host.experts.expert_files"), module("nodes.host.experts.attach")
    model = attach.detach_experts(
        node("DCMLoadModel", model_name=releases["wan_tiny"], weight_dtype="default").result[0]
    )
    expert = files.load_expert("trained/adapter_model.safetensors", "semantic", model)
    assert {u.scale for updates in expert.low_rank.values() for u in updates} == {3.0}
    (peft / "adapter_config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"semantic_lora is '.*adapter_config\.json beside the expert is not valid JSON"
    ):
        files.load_expert("trained/adapter_model.safetensors", "semantic", model)


def test_existing_files_are_kept(node, releases, folder):
    settings = {"model_name": releases["wan_tiny"], "base_name": "b", "expert_name": "e", "dtype": "keep"}
    (folder / "loras" / "e.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="already exists"):
        node("DCMConvertCheckpoint", overwrite=False, **settings)
    assert (folder / "loras" / "e.safetensors").read_bytes() == b"mine"
    node("DCMConvertCheckpoint", overwrite=True, **settings)
    assert len(load_file(folder / "loras" / "e.safetensors")) == 60
    for name in ("", "../outside", "  "):
        with pytest.raises(ValueError, match="expected a file name inside"):
            node("DCMConvertCheckpoint", overwrite=True, **{**settings, "base_name": name})


def test_only_files_that_would_be_written_are_in_the_way(node, module, releases, folder, recipe):
    """A model without experts gives no expert file."""
    save_file(without_experts(recipe, "wan_tiny"), folder / "diffusion_models" / "plain.safetensors")
    (folder / "loras" / "e.safetensors").write_bytes(b"mine")
    node(
        "DCMConvertCheckpoint",
        model_name="plain.safetensors",
        base_name="b",
        expert_name="e",
        dtype="keep",
        overwrite=False,
    )
    assert (folder / "loras" / "e.safetensors").read_bytes() == b"mine" and (
        folder / "diffusion_models" / "b.safetensors"
    ).exists()


def test_choices_that_are_none(node, releases, folder):
    """Older hosts do not check them."""
    settings = {"model_name": releases["wan_tiny"], "base_name": "b", "expert_name": "e"}
    with pytest.raises(ValueError, match="dtype is 'int3'; choose one of keep"):
        node("DCMConvertCheckpoint", dtype="int3", overwrite=False, **settings)
    with pytest.raises(ValueError, match="experts is 'stacked'; choose one of 'detail on top"):
        node(
            "DCMAttachExperts",
            model=None,
            semantic_lora="none",
            semantic_strength=1.0,
            detail_lora="none",
            detail_strength=1.0,
            boundary=0.0,
            experts="stacked",
        )


@pytest.mark.parametrize(
    ("kind", "category", "inputs"),
    [
        ("DCMLoadModel", "diffusion_models", ["model_name"]),
        ("DCMConvertCheckpoint", "diffusion_models", ["model_name"]),
        ("DCMExtractLoRA", "diffusion_models", ["tuned_model", "base_model"]),
        ("DCMExportExpert", "loras", ["expert", "semantic_lora"]),
        ("DCMExportExpert", "diffusion_models", ["base_model"]),
        ("DCMLoadDataset", "dcm_datasets", ["file_name"]),
        ("DCMAttachExperts", "loras", ["semantic_lora", "detail_lora"]),
        ("DCMTrainSemanticExpert", "loras", ["continue_from"]),
        ("DCMTrainDetailExpert", "loras", ["continue_from", "semantic_lora"]),
    ],
)
def test_a_file_written_anew_is_read_anew(node, module, folder, kind, category, inputs):
    """Training and converting write over their files."""
    path = module("nodes.host.folders").new_file(category, "again", overwrite=True)
    fingerprint = node.classes[kind].fingerprint_inputs
    for name in inputs:
        path.write_bytes(b"")
        others = dict.fromkeys(inputs, "none")
        first = fingerprint(**others | {name: path.name})
        assert first == fingerprint(**others | {name: path.name})
        os.utime(path, (1, 1))
        assert fingerprint(**others | {name: path.name}) != first
        fingerprint(**others | {name: None})  # not known yet
    path.unlink()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("DCMAttachExperts", {"semantic_lora": "none", "detail_lora": "peft/adapter_model.safetensors"}),
        ("DCMInspectModel", {"file": "loras/peft/adapter_model.safetensors"}),
    ],
)
def test_settings_beside_a_peft_file_count(node, folder, kind, inputs):
    (folder / "loras" / "peft").mkdir()
    path = folder / "loras" / "peft" / "adapter_model.safetensors"
    path.write_bytes(b"")
    fingerprint = node.classes[kind].fingerprint_inputs
    states = [fingerprint(**inputs)]
    settings = path.with_name("adapter_config.json")
    settings.write_text("{}")
    states.append(fingerprint(**inputs))
    os.utime(settings, (1, 1))
    states.append(fingerprint(**inputs))
    assert all(a != b for a, b in itertools.combinations(states, 2))
    shutil.rmtree(path.parent)


def test_interrupted_conversion_leaves_nothing(node, releases, folder):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        node(
            "DCMConvertCheckpoint",
            model_name=releases["wan_tiny"],
            base_name="b",
            expert_name="e",
            dtype="keep",
            overwrite=False,
        )
    assert not files_in(folder / "loras")
    assert {path.name for path in files_in(folder / "diffusion_models")} == set(releases.values())


def test_extracted_lora_makes_the_tuned_model(node, module, releases, folder, recipe, velocity):
    node(
        "DCMConvertCheckpoint",
        model_name=releases["wan_tiny"],
        base_name="tuned",
        expert_name="e",
        dtype="float32",
        overwrite=False,
    )
    tuned = load_file(folder / "diffusion_models" / "tuned.safetensors")
    generator = torch.Generator().manual_seed(0)
    base = {k: v - 0.02 * torch.randn(v.shape, generator=generator) * v.std(correction=0) for k, v in tuned.items()}
    save_file(base, folder / "diffusion_models" / "base.safetensors")
    out = node(
        "DCMExtractLoRA",
        tuned_model="tuned.safetensors",
        base_model="base.safetensors",
        rank=256,
        name="sem",
        overwrite=False,
    )
    assert "100.00% of the difference's energy kept" in text(out)
    with safe_open(folder / "loras" / "sem.safetensors", "pt") as file:
        assert file.metadata()["dcm.expert"] == "semantic"
    plain = in_float32(module, "base.safetensors")
    attached = node(
        "DCMAttachExperts",
        model=plain,
        semantic_lora="sem.safetensors",
        semantic_strength=1.0,
        detail_lora="none",
        detail_strength=1.0,
        boundary=0.0,
    ).result[0]
    reference = recipe.expected("wan_tiny")["probe.979.0"]
    before, after = (relative(velocity(m, "wan_tiny", 0.979), reference) for m in (plain, attached))
    assert after < before / 100, "what is left is the rounding of the bfloat16 pairs"


def test_conditioning_round_trip(node, folder):
    generator = torch.Generator().manual_seed(0)
    given = [
        [
            torch.randn(1, 7, 4096, generator=generator).bfloat16(),
            {
                "pooled_output": torch.randn(1, 768, generator=generator),
                "guidance": 6.0,
                "note": "x",
                "flag": True,
                "nothing": None,
            },
        ],
        [torch.zeros(1, 2, 4096), {}],
    ]
    node("DCMSaveConditioning", conditioning=given, name="fox", overwrite=False)
    out = node("DCMLoadConditioning", name="fox.safetensors")
    assert "2 prompts, 7 tokens of width 4096" in text(out)
    for (a, extras), (b, again) in zip(given, out.result[0], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert extras.keys() == again.keys()
        assert all(torch.equal(v, again[k]) if torch.is_tensor(v) else v == again[k] for k, v in extras.items())
    with pytest.raises(ValueError, match="already exists"):
        node("DCMSaveConditioning", conditioning=given, name="fox", overwrite=False)
    with pytest.raises(ValueError, match="contains `control`, a object"):
        node("DCMSaveConditioning", conditioning=[[given[0][0], {"control": object()}]], name="c", overwrite=False)
    save_file({"a": torch.zeros(1)}, folder / "dcm_conditioning" / "other.safetensors")
    with pytest.raises(ValueError, match="is not a saved conditioning"):
        node("DCMLoadConditioning", name="other.safetensors")


def test_every_node_says_what_everything_is(node):
    assert set(node.classes) == NODE_IDS
    for name, cls in node.classes.items():
        schema = cls.GET_SCHEMA()
        assert schema.node_id == cls.__name__ == name
        assert schema.description
        assert schema.category.startswith("DCM/")
        assert all(item.tooltip for item in [*schema.inputs, *schema.outputs]), name
        assert all(output.display_name for output in schema.outputs), name
