"""Experts taken out of ComfyUI by the node, and back: the golden releases, tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file

from ..compare import relative
from .test_convert_nodes import RELEASES, TOLERANCE, core_model, golden_conditioning, left_in, probes, velocity

DEFAULTS = {
    "format": "DCM release",
    "base_model": "none",
    "semantic_lora": "none",
    "rank": 0,
    "dtype": "keep",
    "overwrite": False,
}


@pytest.fixture(scope="module")
def folder(pack, models):
    """The models folder; files that tests of this module add are removed at its end."""
    before = set(models.rglob("*"))
    yield models
    for path in sorted(set(models.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture(scope="module", params=RELEASES)
def split(request, releases, node, folder):
    """(name of a golden release, its base, its expert), split by the node."""
    model = request.param
    base, expert = (f"{model}_{part}.safetensors" for part in ("out_base", "out_expert"))
    settings = {"base_name": base, "expert_name": expert, "dtype": "keep", "overwrite": True}
    node("DCMConvertCheckpoint", model_name=releases[model], **settings)
    return model, base, expert


def export(node, expert, **settings):
    return node("DCMExportExpert", expert=expert, **DEFAULTS | settings)


def text(output):
    return output.ui.as_dict()["text"][0]


def test_a_golden_release_comes_back_and_gives_the_official_numbers(split, node, module, recipe, folder):
    model, base, expert = split
    output = export(node, expert, name=f"back/{model}", base_model=base)
    path = folder / "diffusion_models" / "back" / f"{model}.safetensors"
    assert output.result[0] == str(path) and "LoRA rank 8" in text(output)
    back, release = load_file(path), recipe.release(model)
    assert back.keys() == release.keys()
    for key, tensor in release.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    load = module("nodes.host.experts.load")
    load.WEIGHT_DTYPES["float32"] = {"dtype": torch.float32}
    loaded, _ = load.load_model(path.relative_to(folder / "diffusion_models").as_posix(), "float32")
    del load.WEIGHT_DTYPES["float32"]
    expected = recipe.expected(model)
    for sigma, tensor in probes(expected).items():
        assert relative(velocity(loaded, expected, sigma, golden_conditioning(expected)), tensor) < TOLERANCE, sigma


def test_a_peft_adapter_is_attached_like_the_expert(split, node, folder, recipe):
    model, base, expert = split
    output = export(node, expert, name=f"{model}_adapter", format="PEFT adapter")
    path = folder / "loras" / f"{model}_adapter"
    assert output.result[0] == str(path) and "PeftModel.from_pretrained" in text(output)
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    expected = recipe.expected(model)
    velocities = []
    for name in (expert, f"{model}_adapter/adapter_model.safetensors"):
        settings = {"semantic_lora": "none", "semantic_strength": 1.0, "detail_strength": 1.0, "boundary": 0.0}
        attached = node("DCMAttachExperts", model=core_model(base), detail_lora=name, **settings).result[0]
        velocities.append([velocity(attached, expected, sigma) for sigma in probes(expected)])
    assert all(torch.equal(one, other) for one, other in zip(*velocities, strict=True))


def test_a_diffusers_lora_says_what_it_leaves_out(split, node, folder):
    model, _, expert = split
    output = export(node, expert, name=f"{model}_lora", format="diffusers LoRA", dtype="float16")
    tensors = load_file(folder / "loras" / f"{model}_lora.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(key.startswith("transformer.") and ".lora_" in key for key in tensors)
    assert "Left out" in text(output) and "proj_out" in text(output)


def test_inspect_knows_an_adapter(split, node):
    model, _, expert = split
    export(node, expert, name=f"{model}_seen", format="PEFT adapter")
    facts = node("DCMInspectModel", file=f"loras/{model}_seen/adapter_model.safetensors").result[0]
    for word in ("expert or LoRA", "experts: detail", "scale 2 from adapter_config.json"):
        assert word in facts
    assert "problem" not in facts and "odd keys" not in facts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "base_model is none, but a DCM release contains the base model too"),
        ({"format": "zip"}, "format is 'zip'; choose one of DCM release"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"format": "PEFT adapter", "name": "../out"}, "points outside the folder"),
        ({"format": "diffusers LoRA", "name": ""}, "is empty"),
        ({"base_model": "nowhere.safetensors"}, "base_model is 'nowhere.safetensors', which does not exist"),
        ({"semantic_lora": "nowhere.safetensors", "base_model": "BASE"}, "semantic_lora is 'nowhere"),
        ({"base_model": "BASE", "rank": 4}, "rank is 4, but the detail expert's LoRA has rank 8"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(split, node, folder, settings, message):
    _, base, expert = split
    before = left_in(folder.parent)
    settings = {name: base if value == "BASE" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        export(node, expert, **{"name": "wrong"} | settings)
    assert left_in(folder.parent) == before


@pytest.mark.parametrize("format", ["DCM release", "PEFT adapter", "diffusers LoRA"])
def test_files_are_written_over_only_when_asked(split, node, format):
    model, base, expert = split
    settings = {"name": f"{model}_twice", "format": format, "base_model": base}
    export(node, expert, **settings)
    with pytest.raises(ValueError, match=r"already exists?"):
        export(node, expert, **settings)
    export(node, expert, **settings, overwrite=True)
