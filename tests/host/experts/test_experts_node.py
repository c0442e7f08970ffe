"""DCM Attach Experts with files as people have them: what it tells on the node, in the log and in errors."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

Q = "diffusion_model.blocks.0.self_attn.q"
SETTINGS = {
    "semantic_lora": "none",
    "semantic_strength": 1.0,
    "detail_lora": "none",
    "detail_strength": 1.0,
    "boundary": 0.0,
}
SIDES = ["semantic", "detail"]


@pytest.fixture(scope="module")
def base(wan):
    return wan(layers=1)


@pytest.fixture
def save(models, tmp_path):
    """save(tensors, metadata, **settings files) -> the name of a LoRA in a folder of its own."""
    folder = models / "loras" / tmp_path.name
    folder.mkdir(exist_ok=True)

    def write(tensors, metadata=None, /, **files):
        save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
        for name, values in files.items():
            (folder / f"{name}.json").write_text(json.dumps(values))
        return f"{folder.name}/pytorch_lora_weights.safetensors"

    yield write
    shutil.rmtree(folder)


def pair(module, width=256):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def text(output):
    return output.ui.as_dict()["text"][0] if hasattr(output.ui, "as_dict") else output.ui["text"][0]


@pytest.mark.parametrize("side", SIDES)
def test_what_was_left_out_or_assumed_is_told(node, base, save, caplog, side):
    lora = pair(Q) | pair("diffusion_model.blocks.0.cross_attn.k_img") | pair("text_encoder.layers.0.q")
    with caplog.at_level(logging.WARNING, "ComfyUI-DCM"):
        shown = text(
            node("DCMAttachExperts", model=base, **SETTINGS | {f"{side}_lora": save(lora), f"{side}_strength": 0.5})
        )
    assert f"{side} expert: LoRA rank 4, 1 layer matched, strength 0.5" in shown.splitlines()
    left_out = "left out 2 tensors: "
    for note in (
        "no alpha: scale 1",
        f"{left_out}image layers, which this model does not have",
        f"{left_out}text encoder LoRA",
    ):
        assert note in shown
        assert any(
            record.getMessage().startswith(f"pytorch_lora_weights.safetensors: {note}") for record in caplog.records
        )


def test_nothing_is_told_of_a_file_that_says_all(node, base, save, caplog):
    lora = pair(Q) | {f"{Q}.alpha": torch.tensor(8.0)}
    with caplog.at_level(logging.WARNING, "ComfyUI-DCM"):
        shown = text(node("DCMAttachExperts", model=base, **SETTINGS | {"detail_lora": save(lora)}))
    assert shown.splitlines() == ["detail expert: LoRA rank 4, 1 layer matched, strength 1", "boundary 0.979, stacked"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lora_config", {"step": 100, "lora_params": {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["to_q"]}}),
        ("adapter_config", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {}, "rank_pattern": {}}),
    ],
)
def test_settings_beside_a_file_of_any_name(node, module, base, save, name, values):
    file = save(pair(Q), **{name: values})
    assert f"scale 2 from {name}.json" in text(node("DCMAttachExperts", model=base, **SETTINGS | {"detail_lora": file}))
    expert = module("nodes.host.experts.expert_files").load_expert(file, "detail", base)
    assert expert.low_rank["blocks.0.self_attn.q"][0].scale == 2
    looked = node("DCMInspectModel", file=f"loras/{file}").result[0]
    assert f"alpha: scale 2 from {name}.json" in looked


def test_inspect_says_that_there_is_no_alpha(node, save):
    assert "alpha: no alpha: scale 1" in node("DCMInspectModel", file=f"loras/{save(pair(Q))}").result[0]


def test_settings_beside_a_file_count_as_its_own(node, save):
    fingerprint = node.classes["DCMAttachExperts"].fingerprint_inputs
    file = save(pair(Q))
    first = fingerprint(semantic_lora=file, detail_lora="none")
    save(pair(Q), lora_config={"lora_alpha": 8})
    assert fingerprint(semantic_lora=file, detail_lora="none") != first


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            pair(Q),
            {"dcm.boundary": "abc"},
            r"Its metadata says dcm\.boundary = 'abc'; expected a number between 0 and 1\. Save or",
        ),
        (
            pair(Q),
            {"dcm.timesteps": "5"},
            r"Its metadata says dcm\.timesteps = '5'; expected falling numbers within 0 to 1000",
        ),
        (
            pair(Q),
            {"lora_adapter_metadata": "[" * 99_999},
            "Its metadata lora_adapter_metadata is nested more than 32 levels deep",
        ),
        ({f"{Q}.ia3_l": torch.ones(256)}, None, r"The file has 1 IA3 tensor \(.*ia3_l\)"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, None, "ComfyUI cannot apply the LoKr of .* The file is incomplete, or"),
        (
            pair(Q, 32),
            None,
            r"have shapes \(4, 32\) and \(32, 4\); the model's blocks\.0\.self_attn\.q is \(256, 256\)\. Use an expert made",
        ),
    ],
)
def test_errors_name_the_widget_and_the_file(node, base, save, side, tensors, metadata, message):
    name = save(tensors, metadata)
    with pytest.raises(ValueError, match=rf"^{side}_lora is '{name}'\. .*{message}"):
        node("DCMAttachExperts", model=base, **SETTINGS | {f"{side}_lora": name})


@pytest.mark.parametrize(("side", "other"), [SIDES, SIDES[::-1]])
def test_a_file_on_the_wrong_side(node, base, save, side, other):
    name = save(pair(Q), {"dcm.expert": other})
    with pytest.raises(
        ValueError,
        match=rf"^{side}_lora is '{name}', which is a {other} expert\. Select it under {other}_lora instead\.$",
    ):
        node("DCMAttachExperts", model=base, **SETTINGS | {f"{side}_lora": name})


def test_training_names_its_own_widgets(module, base, save):
    name = save(pair(Q), {"dcm.expert": "detail"})
    load = module("nodes.host.experts.expert_files").load_expert
    with pytest.raises(
        ValueError, match=rf"^continue_from is '{name}', which is a detail expert\. Choose another file\.$"
    ):
        load(name, "semantic", base, "continue_from")
