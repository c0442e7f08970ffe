"""Files our nodes write, read by the host's own loaders, against the official code's numbers."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..compare import relative

RELEASES = {"wan_tiny": "wan", "hy_tiny": "hunyuan_video"}
BOUNDARIES = {"wan_tiny": 0.979, "hy_tiny": 0.982}
TOLERANCE = 1e-5


def golden_conditioning(expected):
    """The golden text as the host passes it; of masked text only the valid tokens."""
    context = expected["context"].float()
    if "mask" not in expected:
        return [[context, {}]]
    valid = int(expected["mask"].sum())
    return [[context[:, :valid], {"pooled_output": expected["pooled"].float(), "guidance": 6.0}]]


def velocity(model, expected, sigma, cond=None):
    """The transformer's own output on the golden noise, through the host's sampling machinery."""
    import comfy.samplers

    outputs = []
    hook = model.model.diffusion_model.register_forward_hook(lambda module, args, output: outputs.append(output))

    def one_call(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        denoise(x, sigmas[:1].expand(len(x)), **extra_args)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": cond or golden_conditioning(expected)})
    noise = expected["noise"]
    try:
        with torch.inference_mode():
            sampler = comfy.samplers.KSAMPLER(one_call)
            guider.sample(noise / sigma, torch.zeros_like(noise), sampler, torch.tensor([sigma, 0.0]), seed=0)
    finally:
        hook.remove()
    return outputs[0].float()


def probes(expected):
    return {
        float(key.removeprefix("probe.")) / 1000: tensor for key, tensor in expected.items() if key.startswith("probe.")
    }


def core_model(name):
    """As core's UNETLoader does it."""
    import nodes

    return nodes.UNETLoader().load_unet(name, "default")[0]


def core_lora(model, name):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]


@pytest.fixture(scope="module")
def folder(pack, models):
    """The models folder; files that tests of this module add are removed at its end."""
    before = set(models.rglob("*"))
    yield models
    for path in set(models.rglob("*")) - before:
        if path.is_file() and path.name not in {f"{name}.safetensors" for name in RELEASES}:
            path.unlink()


@pytest.fixture(scope="module", params=RELEASES)
def golden(request, releases, node, recipe, folder):
    """(base file name, expert file name, expected tensors, boundary) of a release converted to float32 by our node."""
    model = request.param
    base, expert = f"{model}_base.safetensors", f"{model}_expert.safetensors"
    output = node(
        "DCMConvertCheckpoint",
        model_name=releases[model],
        base_name=base,
        expert_name=expert,
        dtype="float32",
        overwrite=False,
    )
    assert output.result == (str(folder / "diffusion_models" / base), str(folder / "loras" / expert))
    return base, expert, recipe.expected(model), BOUNDARIES[model]


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# converted files in core's own loaders


def test_core_loads_the_base_as_the_semantic_expert(golden):
    base, _, expected, boundary = golden
    model = core_model(base)
    semantic = {sigma: tensor for sigma, tensor in probes(expected).items() if sigma >= boundary}
    assert boundary in semantic
    for sigma, tensor in semantic.items():
        assert relative(velocity(model, expected, sigma), tensor) < TOLERANCE, sigma


def test_core_loads_the_expert_as_a_lora(golden, caplog):
    base, expert, expected, boundary = golden
    with caplog.at_level("WARNING"):
        model = core_lora(core_model(base), expert)
    assert "not loaded" not in caplog.text
    detail = {sigma: tensor for sigma, tensor in probes(expected).items() if sigma < boundary}
    assert len(detail) >= 3
    for sigma, tensor in detail.items():
        assert relative(velocity(model, expected, sigma), tensor) < TOLERANCE, sigma


def test_our_attach_node_routes_the_same_files(golden, node):
    base, expert, expected, _ = golden
    model = node(
        "DCMAttachExperts",
        model=core_model(base),
        semantic_lora="none",
        semantic_strength=1.0,
        detail_lora=expert,
        detail_strength=1.0,
        boundary=0.0,
    ).result[0]
    for sigma, tensor in probes(expected).items():
        assert relative(velocity(model, expected, sigma), tensor) < TOLERANCE, sigma


def test_the_host_sees_the_new_files_at_once(golden, node):
    base, expert, *_ = golden
    inputs = node.classes["DCMAttachExperts"].INPUT_TYPES()["required"] | node.classes[
        "DCMAttachExperts"
    ].INPUT_TYPES().get("optional", {})
    assert expert in str(inputs["detail_lora"])
    assert base in str(node.classes["DCMLoadModel"].INPUT_TYPES()["required"]["model_name"])


# conversion gone wrong


def convert(node, name, **changes):
    settings = {"base_name": "new_base", "expert_name": "new_expert", "dtype": "keep", "overwrite": False} | changes
    return node("DCMConvertCheckpoint", model_name=name, **settings)


def test_an_interrupt_on_the_way_keeps_what_was_there(golden, releases, node, folder, monkeypatch):
    import comfy.model_management
    import comfy.utils

    def stop_halfway(value, total, preview, **_):
        if value > total / 2:
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop_halfway)
    before = left_in(folder)
    content = (folder / "diffusion_models" / golden[0]).read_bytes()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert(node, releases["wan_tiny"], base_name=golden[0], expert_name=golden[1], overwrite=True)
    assert left_in(folder) == before
    assert (folder / "diffusion_models" / golden[0]).read_bytes() == content
    assert not comfy.model_management.processing_interrupted(), "the host's flag is used up"


def test_progress_reaches_the_end(releases, node, monkeypatch, every_update):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total))
    )
    convert(node, releases["wan_tiny"], base_name="bar", expert_name="bar")
    assert seen == sorted(seen) and len(seen) > 10
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("name", ["", " ", "../outside", "a/../../outside", "/outside"])
def test_names_outside_the_folders(releases, node, folder, name):
    before = left_in(folder.parent)
    for which in ("base_name", "expert_name"):
        with pytest.raises(ValueError, match="expected a file name inside"):
            convert(node, releases["wan_tiny"], **{which: name})
    assert left_in(folder.parent) == before


def test_a_release_is_not_written_over_itself(releases, node, folder):
    path = folder / "diffusion_models" / releases["wan_tiny"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="different from the input"):
        convert(node, releases["wan_tiny"], base_name=releases["wan_tiny"], overwrite=True)
    assert path.read_bytes() == before


# extraction


def before_tuning(tensors):
    """A base of which `tensors` are a fine-tune: low-rank in some matrices, anything in some other tensors."""
    generator = torch.Generator().manual_seed(1)
    changed = dict(tensors)
    for key, tensor in sorted(tensors.items())[::3]:
        change = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2 and key.endswith(".weight"):
            change = change[:, :4] @ torch.randn(4, tensor.shape[1], generator=generator) / 2
        changed[key] = tensor + 0.1 * change * tensor.std(correction=0)
    return changed


def test_an_extracted_lora_restores_the_fine_tune_in_core(golden, node, folder):
    name, _, expected, boundary = golden
    base, lora = f"before_{name}", f"semantic_{name}"
    save_file(before_tuning(load_file(folder / "diffusion_models" / name)), folder / "diffusion_models" / base)
    output = node("DCMExtractLoRA", tuned_model=name, base_model=base, rank=4, name=lora, overwrite=False)
    assert output.result[0] == str(folder / "loras" / lora)
    for line in output.result[1].splitlines():
        _, rank, energy, _ = line.split("\t")
        assert rank == "4" and float(energy.rstrip("%")) > 99.99, line
    model = core_model(base)
    before, after = (
        relative(velocity(m, expected, boundary), probes(expected)[boundary]) for m in (model, core_lora(model, lora))
    )
    assert after < before / 100, "what is left is the rounding of the bfloat16 pairs"


@pytest.mark.parametrize("kind", ["norms", "everything"])
@pytest.mark.parametrize("experts", ["detail on top of semantic (as released)", "independent, each on its side"])
def test_files_that_the_host_saves(releases, node, module, recipe, folder, kind, experts):
    """A fine-tune saved by this host, in whatever names it has; the base in those of older ones."""
    import comfy.sd

    name = "hy_tiny_saved"
    node(
        "DCMConvertCheckpoint",
        model_name=releases["hy_tiny"],
        base_name=name,
        expert_name=name,
        dtype="float32",
        overwrite=True,
    )
    base, expected = f"{name}.safetensors", recipe.expected("hy_tiny")
    model = core_model(base)
    want = velocity(model, expected, 1.0)
    comfy.sd.save_checkpoint(str(folder / "diffusion_models" / f"tuned_{name}.safetensors"), model)
    weights = load_file(folder / "diffusion_models" / base)
    changed = before_tuning(weights) if kind == "everything" else weights
    save_file(
        changed | {key: 1.5 * value for key, value in weights.items() if "y_norm" in key},
        folder / "diffusion_models" / base,
    )
    node(
        "DCMExtractLoRA",
        tuned_model=f"tuned_{name}.safetensors",
        base_model=base,
        rank=4,
        name=f"{name}.safetensors",
        overwrite=True,
    )
    facts = node("DCMInspectModel", file=f"diffusion_models/tuned_{name}.safetensors").result[0]
    assert "native layout" in facts and "HunyuanVideo" in facts
    before = core_model(base)
    after = node(
        "DCMAttachExperts",
        model=before,
        semantic_lora=f"{name}.safetensors",
        semantic_strength=1.0,
        detail_lora="none",
        detail_strength=1.0,
        experts=experts,
        boundary=0.0,
    ).result[0]
    assert relative(velocity(before, expected, 1.0), want) > 0.01
    assert relative(velocity(after, expected, 1.0), want) < 0.002, "the rounding of the bfloat16 file"


# conditioning


def test_conditioning_comes_back_bit_for_bit(golden, node, folder):
    base, _, expected, boundary = golden
    conditioning = golden_conditioning(expected)
    saved = node("DCMSaveConditioning", conditioning=conditioning, name=f"deep/{base}", overwrite=False)
    assert saved.result[0] is conditioning
    path = folder / "dcm_conditioning" / "deep" / base
    assert path.exists()
    load = node.classes["DCMLoadConditioning"]
    assert f"deep/{base}" in load.INPUT_TYPES()["required"]["name"][1]["options"]
    loaded = node("DCMLoadConditioning", name=f"deep/{base}").result[0]
    assert [entry[1].keys() for entry in loaded] == [entry[1].keys() for entry in conditioning]
    assert torch.equal(loaded[0][0], conditioning[0][0])
    model = core_model(base)
    assert torch.equal(velocity(model, expected, boundary, loaded), velocity(model, expected, boundary, conditioning))


def test_a_changed_conditioning_file_is_loaded_anew(node, folder):
    load = node.classes["DCMLoadConditioning"]
    save = {"conditioning": [[torch.ones(1, 2, 3), {}]], "name": "print"}
    node("DCMSaveConditioning", **save, overwrite=False)
    first = load.fingerprint_inputs(name="print.safetensors")
    assert first == load.fingerprint_inputs(name="print.safetensors")
    with pytest.raises(ValueError, match="already exists"):
        node("DCMSaveConditioning", **save, overwrite=False)
    node("DCMSaveConditioning", **save, overwrite=True)
    os.utime(folder / "dcm_conditioning" / "print.safetensors", (1, 1))
    assert load.fingerprint_inputs(name="print.safetensors") != first
