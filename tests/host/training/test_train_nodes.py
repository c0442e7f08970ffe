"""The training nodes and the command, as their users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from .small_runs import by_its_schedule

ROOT = Path(__file__).parents[3]
COMMON = {
    "steps": 2,
    "learning_rate": 1e-3,
    "rank": 4,
    "alpha": 8.0,
    "batch_size": 2,
    "accumulate": 1,
    "seed": 0,
    "boundary": 0.9,
    "gradient_checkpointing": True,
    "shift": 5.0,
    "sample_steps": 4,
    "cfg": 2.0,
    "ema_decay": 0.9,
    "scheduler": "constant",
    "save_every": 1,
    "held_out": 1,
    "sample_every": 1,
}
INPUTS = json.loads((Path(__file__).parent / "node_inputs.json").read_text(encoding="utf-8"))
# inputs that saved graphs hold by another name than the setting's
OTHER_IDS = {"accumulate": "gradient_accumulation_steps"}
COMMAND_LINE_ALONE = {
    "weight_decay",
    "clip_norm",
    "discriminator_weight_decay",
    "discriminator_clip_norm",
    "divergence",
    "points",
    "shared",
    "feature_weight",
    "held_out_every",
}
SEMANTIC = {**COMMON, "temporal_weight": 1.0}
DETAIL = {**COMMON, "adversarial_weight": 0.1, "discriminator_learning_rate": 1e-4, "discriminator_width": 64}


@pytest.fixture
def output(pack, models, tmp_path, monkeypatch):
    """The host's output folder; experts that a test writes are removed after it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path
    for path in (models / "loras" / "dcm").glob("*"):
        path.unlink()


@pytest.fixture
def trained(node, wan, data, output):
    """(model, semantic node output, detail node output)"""
    model = wan(layers=2)
    semantic = node("DCMTrainSemanticExpert", model=model, dataset=data, name="one", **SEMANTIC)
    detail = node(
        "DCMTrainDetailExpert", model=model, dataset=data, name="two", semantic_expert=semantic.result[1], **DETAIL
    )
    return model, semantic, detail


def test_nodes_train_save_and_show(trained, output, models):
    _, semantic, detail = trained
    for node_output, name, terms in ((semantic, "one", 5), (detail, "two", 7)):
        _, expert, file, losses = node_output.result
        assert Path(file) == models / "loras" / "dcm" / f"{name}.safetensors" and Path(file).is_file()
        assert losses.shape == (terms, 432, 768, 3) and losses.min() >= 0 and losses.max() <= 1
        assert list((output / "dcm_training" / name).glob("step_*.safetensors"))
        text = node_output.ui.as_dict()["text"][0]
        assert f"{expert.role} expert: LoRA rank 4" in text and "2 steps" in text and file in text


def described(item):
    """What a saved graph relies on, and what a user sees of an input; a host's own additions left out."""
    names = ("default", "min", "max", "step", "round", "control_after_generate", "tooltip", "advanced", "optional")
    found = {name: getattr(item, name, None) for name in names}
    found["options"] = item.options if item.id in ("scheduler", "recipe", "optimizer") else None
    found = {name: value for name, value in found.items() if value is not None and (name, value) != ("optional", False)}
    return {"id": item.id, "type": item.get_io_type(), **found}


@pytest.mark.parametrize("name", INPUTS)
def test_the_inputs_are_those_that_saved_graphs_hold(name, module):
    """Graphs hold values by their place."""
    train = module("nodes.train")
    known = module("nodes.host.compat").advanced(train.io.Int.Input)
    expected = [{key: value for key, value in item.items() if key != "advanced" or known} for item in INPUTS[name]]
    assert [described(item) for item in getattr(train, name).define_schema().inputs] == expected


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_inputs_are_the_settings_of_a_run(side, module):
    """Every setting that a node has is made from the setting, for the expert that has it."""
    config = module("dcm_core.distill.config")
    node = getattr(module("nodes.train"), f"DCMTrain{side.capitalize()}Expert")
    inputs = {OTHER_IDS.get(item.id, item.id): item for item in node.define_schema().inputs}
    offered = {
        name for name, about in config.SETTINGS.items() if about.only in (None, side) and name not in COMMAND_LINE_ALONE
    }
    assert offered == inputs.keys() & config.SETTINGS.keys()
    for name in offered:
        assert inputs[name].tooltip == config.SETTINGS[name].help_for(side), name
        # within the limits of a run
        config.TrainingConfig(side, **{name: inputs[name].default} if inputs[name].default is not None else {})
        for value in (getattr(inputs[name], "min", None), getattr(inputs[name], "max", None)):
            if value is not None:
                config.TrainingConfig(side, **{name: value})


def test_experts_are_usable_at_once_and_from_their_files(trained, node, sample):
    model, semantic, detail = trained
    sigmas = [1.0, 0.95, 0.8, 0.0]
    straight = sample(detail.result[0], sigmas)
    names = {"semantic_strength": 1.0, "detail_strength": 1.0, "boundary": 0.0}
    objects = node(
        "DCMAttachExperts",
        model=model,
        semantic_lora="none",
        detail_lora="none",
        semantic_expert=semantic.result[1],
        detail_expert=detail.result[1],
        **names,
    )
    assert torch.equal(straight, sample(objects.result[0], sigmas))
    files = node(
        "DCMAttachExperts", model=model, semantic_lora="dcm/one.safetensors", detail_lora="dcm/two.safetensors", **names
    )
    # the files are bfloat16
    other = sample(files.result[0], sigmas)
    assert (straight - other).norm() / straight.norm() < 1e-2
    assert (straight - sample(model, sigmas)).norm() / straight.norm() > 1e-3
    assert "boundary 0.9" in files.ui.as_dict()["text"][0]


def test_a_recipe_takes_over_what_was_left_at_its_default(wan, node, data, output, module):
    """With its limits on the discriminator's optimiser, as in the official code."""
    settings = {**DETAIL, "discriminator_learning_rate": 5e-6, "sample_every": 0, "held_out": 0}
    trained = node(
        "DCMTrainDetailExpert", model=wan(layers=1), dataset=data, name="r", recipe="official Wan", **settings
    )
    text = trained.ui.as_dict()["text"][0]
    assert text.startswith(
        "Recipe official Wan: warmup_steps 0, weight_decay 0.001, caption_dropout 0.1, discriminator_l"
    )
    assert "Your own: shift 5.0 instead of 17.0, ema_decay 0.9 instead of 0.0, cfg 2.0 instead of 5.0, rank 4" in text
    _, saved = module("dcm_core.distill.checkpoints").newest_checkpoint(output / "dcm_training" / "r")
    values = saved.config.discriminator_learning_rate, saved.config.discriminator_clip_norm, saved.config.weight_decay
    assert values == (1e-5, 1.0, 0.001)
    with pytest.raises(ValueError, match="recipe is official HunyuanVideo, but the model is Wan"):
        node(
            "DCMTrainDetailExpert",
            model=wan(layers=1),
            dataset=data,
            name="s",
            recipe="official HunyuanVideo",
            **settings,
        )


def test_a_detail_expert_on_every_linear(wan, node, data, output):
    settings = {**DETAIL, "adversarial_weight": 0.0, "sample_every": 0, "held_out": 0}
    trained = node(
        "DCMTrainDetailExpert", model=wan(layers=1), dataset=data, name="every", every_linear=True, **settings
    )
    assert {f"blocks.0.{name}" for name in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")} <= set(
        trained.result[1].low_rank
    )
    shown = node(
        "DCMAttachExperts",
        model=wan(layers=1),
        semantic_lora="none",
        detail_lora="dcm/every.safetensors",
        semantic_strength=1.0,
        detail_strength=1.0,
        boundary=0.0,
    ).ui.as_dict()["text"][0]
    assert "boundary 0.9" in shown and f"{trained.result[1]}, strength 1" in shown


def test_sampler_takes_the_trained_schedule(trained, node):
    _, _, detail = trained
    plan = node(
        "DCMSampler",
        model=detail.result[0],
        seed=0,
        **by_its_schedule([[torch.zeros(1, 3, 4096), {}]], (16, 2, 4, 6)),
    ).ui.as_dict()["text"][0]
    assert plan.startswith("step 1-2 semantic, 3-4 detail, boundary 0.9")


def test_the_host_s_memory_is_as_before(wan, node, data, output):
    import comfy.model_management

    model = wan(layers=1)
    loaded = len(comfy.model_management.current_loaded_models)
    node("DCMTrainSemanticExpert", model=model, dataset=data, name="memory", **{**SEMANTIC, "sample_every": 0})
    assert len(comfy.model_management.current_loaded_models) <= loaded + 1
    assert not model.patches and not model.additional_models


def test_wrong_names_and_experts_are_refused(wan, node, data, output, module, models, random_expert):
    errors = module("dcm_core.errors")
    model = wan(layers=1)
    for name in ("", "../elsewhere"):
        with pytest.raises(errors.DCMError, match="name"):
            node("DCMTrainSemanticExpert", model=model, dataset=data, name=name, **SEMANTIC)
    save_file({"transformer.nothing.lora_A.weight": torch.zeros(2, 2)}, models / "loras" / "foreign.safetensors")
    with pytest.raises(errors.DCMError, match=r"continue_from is 'foreign\.safetensors'"):
        node(
            "DCMTrainSemanticExpert",
            model=model,
            dataset=data,
            name="x",
            continue_from="foreign.safetensors",
            **SEMANTIC,
        )
    (models / "loras" / "foreign.safetensors").unlink()
    assert not (output / "dcm_training").exists()


def test_a_run_does_not_write_over_what_it_begins_with(trained, node, data):
    model, _, _ = trained
    with pytest.raises(
        ValueError, match=r"continue_from is dcm/one\.safetensors, which is the file that this run writes"
    ):
        node(
            "DCMTrainSemanticExpert",
            model=model,
            dataset=data,
            name="one",
            continue_from="dcm/one.safetensors",
            **SEMANTIC,
        )
    with pytest.raises(
        ValueError, match=r"semantic_lora is dcm/one\.safetensors, which is the file that this run writes"
    ):
        node(
            "DCMTrainDetailExpert", model=model, dataset=data, name="one", semantic_lora="dcm/one.safetensors", **DETAIL
        )


def test_a_detail_expert_stands_on_no_other(trained, node, data, output):
    model, _, detail = trained
    with pytest.raises(ValueError, match=r"semantic_expert is a detail expert\. Connect a semantic expert there"):
        node(
            "DCMTrainDetailExpert", model=model, dataset=data, name="three", semantic_expert=detail.result[1], **DETAIL
        )
    assert not (output / "dcm_training" / "three").exists()
    both = {
        "model": model,
        "semantic_lora": "none",
        "detail_lora": "none",
        "semantic_strength": 1.0,
        "detail_strength": 1.0,
    }
    with pytest.raises(ValueError, match=r"semantic_expert is a detail expert\. Connect a semantic expert there"):
        node("DCMAttachExperts", semantic_expert=detail.result[1], boundary=0.0, **both)


@pytest.mark.parametrize("other", [{"width": 384}, {"layers": 3}])
def test_a_trained_expert_of_another_model_s_size_is_refused(other, wan, node, data, output, random_expert):
    model, experts = (
        wan(layers=2),
        {side: random_expert(wan(**{"layers": 2, **other}), side) for side in ("semantic", "detail")},
    )
    names = {
        "semantic_lora": "none",
        "detail_lora": "none",
        "semantic_strength": 1.0,
        "detail_strength": 1.0,
        "boundary": 0.0,
    }
    for side, expert in experts.items():
        with pytest.raises(
            ValueError, match=r"blocks\.\d\..* the model's blocks\.\d\..* Use an expert made for a model of this size"
        ):
            node("DCMAttachExperts", model=model, **names, **{f"{side}_expert": expert})
    with pytest.raises(ValueError, match="Use an expert made for a model of this size"):
        node("DCMTrainDetailExpert", model=model, dataset=data, name="x", semantic_expert=experts["semantic"], **DETAIL)
    assert not (output / "dcm_training" / "x").exists()


def test_a_vae_of_other_latents_is_refused(wan, node, data, output):
    with pytest.raises(
        ValueError, match=r"VAE's latents have 48 channels, but the model takes 16\. Connect the model's own VAE"
    ):
        node(
            "DCMTrainSemanticExpert",
            model=wan(layers=1),
            dataset=data,
            name="x",
            vae=SimpleNamespace(latent_channels=48),
            **SEMANTIC,
        )
    assert not (output / "dcm_training").exists()


@pytest.mark.parametrize("metadata", [{"dcm.format": "1", "dcm.family": "hunyuan_video", "dcm.expert": "semantic"}, {}])
def test_an_expert_of_another_family_is_refused(metadata, wan, node, data, output, module, models):
    """As a student, and as the semantic expert under one."""
    errors, model = module("dcm_core.errors"), wan(layers=1)
    site = "diffusion_model.single_blocks.0.linear1"
    pair = {f"{site}.lora_down.weight": torch.zeros(2, 256), f"{site}.lora_up.weight": torch.zeros(1024, 2)}
    file = models / "loras" / "hunyuan.safetensors"
    save_file(pair, file, metadata)
    try:
        for name, settings in (("DCMTrainSemanticExpert", SEMANTIC), ("DCMTrainDetailExpert", DETAIL)):
            given = {"continue_from": file.name} if "Semantic" in name else {"semantic_lora": file.name}
            with pytest.raises(errors.DCMError, match=r"(?i)hunyuan.?video|single_blocks\.0\.linear1") as refused:
                node(name, model=model, dataset=data, name="x", **given, **settings)
            assert "Wan 2.1" in str(refused.value)
    finally:
        file.unlink()
    assert not (output / "dcm_training").exists()


def test_saved_dataset_comes_back(node, data, models):
    node("DCMSaveDataset", dataset=data, file_name="mine", overwrite=True)
    back = node("DCMLoadDataset", file_name="mine.safetensors").result[0]
    assert len(back) == 4 and torch.equal(back.latent(0).float(), data.latent(0).bfloat16().float())


@pytest.mark.parametrize("kind", ["json", "toml"])
def test_command_trains_and_resumes(kind, wan, data, tmp_path, module):
    """python -m dcm_core train, in a process of its own."""
    model = wan(layers=1)
    save_file(
        {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()},
        tmp_path / "base.safetensors",
    )
    module("dcm_core.distill.data.dataset_file").write_dataset(tmp_path / "data.safetensors", data)
    training = {"rank": 2, "alpha": 4.0, "batch_size": 2, "boundary": 0.9, "shift": 5.0}

    def run(steps, **more):
        settings = {"model": "base.safetensors", "dataset": "data.safetensors", "output": "expert.safetensors", **more}
        settings["recipe"] = "official Wan"
        values = {**training, "steps": steps}
        path = tmp_path / f"run.{kind}"
        if kind == "json":
            path.write_text(json.dumps({**settings, "training": values}))
        else:
            lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
            path.write_text(
                "\n".join([*lines, "[training]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())])
            )
        command = [sys.executable, "-m", "dcm_core", "train", "semantic", "--config", str(path)]
        return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)

    first = run(2)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "semantic expert: LoRA rank 2" in first.stdout and ", 2 steps.\nSaved to" in first.stdout
    assert "Recipe official Wan: warmup_steps 0, weight_decay 0.001, " in first.stdout
    assert "Your own: shift 5.0 instead of 17.0, steps 2 instead of 1000, rank 2 instead of 0" in first.stdout
    log = first.stderr
    assert 0 < log.index("Peak memory about") < log.index("Step 2 of 2: loss"), "told before the first step"
    assert ", 3 steps.\nResumed from step 2 of 3, changed: steps: 2 -> 3.\nSaved to" in run(3).stdout
    assert list((tmp_path / "expert_checkpoints").glob("step_00000003.safetensors"))
    assert {path.name for path in (tmp_path / "expert_checkpoints").glob("*.png")} >= {
        "loss_loss.png",
        "loss_huber.png",
        "loss_temporal.png",
    }
    wrong = run(3, modle="x")
    assert wrong.returncode == 2 and "Unknown setting modle. Valid settings: " in wrong.stderr


def test_a_run_that_an_earlier_version_has_begun_keeps_its_folder(tmp_path, module):
    default = module("nodes.host.training.parts").default_checkpoints
    assert default(tmp_path, "mine") == tmp_path / "mine_checkpoints"
    (tmp_path / "mine_states").mkdir()
    assert default(tmp_path, "mine") == tmp_path / "mine_states"
    assert default(tmp_path, "other") == tmp_path / "other_checkpoints"


def test_a_model_that_the_host_cannot_load_to_stay_is_refused(train, module, wan, tmp_path, data, config, monkeypatch):
    def no_delegate(patcher):
        raise RuntimeError("cached_patcher_init is not initialized.")

    model = wan(layers=1)
    monkeypatch.setattr(type(model), "get_non_dynamic_delegate", no_delegate, raising=False)
    with pytest.raises(
        module("dcm_core.distill.config").TrainingError, match=r"not initialized.*--disable-dynamic-vram"
    ):
        train(model, data, config("semantic"), tmp_path)


@pytest.fixture(scope="module")
def base_file(wan, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({name: value.clone() for name, value in wan(layers=1).model.diffusion_model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"training": None}, "`training` is None; expected a table of settings"),
        ({"checkpoints": 5}, "`checkpoints` is 5; expected a path"),
        ({"recipe": "Wan"}, "recipe is 'Wan'; choose one of custom, official Wan, official HunyuanVideo"),
        (
            {"recipe": "official HunyuanVideo"},
            r"the model is Wan 2\.1, not HunyuanVideo\. Choose official Wan or custom",
        ),
        ({"states": 5}, "`checkpoints` is 5; expected a path"),
        ({"states": "a", "checkpoints": "b"}, "states is the old name of checkpoints, and both are set"),
        ({"output": "."}, "`output` is .*, which is a folder; expected the name of the file to write"),
        ({"weight_dtype": ["default"]}, r"weight_dtype is \['default'\]; choose one of default"),
        ({"semantic": "expert.safetensors"}, "semantic is expert.safetensors, which is the file that this run writes"),
        ({"output": "base.safetensors"}, "model is base.safetensors, which is the file that this run writes"),
        ({"output": "data.safetensors"}, "dataset is data.safetensors, which is the file that this run writes"),
        (
            {"text_encoders": ["a.safetensors", "./expert.safetensors"]},
            "text_encoders is ./expert.safetensors, which is the file that this run",
        ),
        ({"dataset": 3}, "`dataset` is 3"),
        ({"text_encoders": 3, "dataset": 4}, "`dataset` is 4"),
        ({"dataset": {"folder": "clips", "width": "832"}}, "width of `dataset` is '832'; expected a whole number"),
        (
            {"dataset": {"folder": "clips", "windows": 1}},
            "Unknown setting windows in `dataset`. Valid settings: folder, ",
        ),
        (
            {"model": "nix.safetensors"},
            r"`model` is nix\.safetensors, but .*nix\.safetensors does not exist\. Check the",
        ),
        ({"clip_vision": "nix"}, "`clip_vision` is nix, but .* does not exist"),
        ({"checkpoints": "base.safetensors/x"}, r"`checkpoints` is .*x, which cannot be written \(Not a directory\)"),
        ({"dataset": {"folder": "clips", "fps": None}}, "fps of `dataset` is None; expected a number"),
        ({"dataset": {"folder": "clips", "buckets": 1}}, "buckets of `dataset` is 1; expected true or false"),
        ({"dataset": {"folder": "clips", "negative": 5}}, "negative of `dataset` is 5; expected a text"),
        ({"output": "base.safetensors/expert"}, "`output` is .*, which cannot be written"),
        ({"output": "x" * 300}, r"`output` is .*, which cannot be written \(File name too long\)"),
        ({"output": "a\0b"}, "`output` is .*; expected a path"),
        ({"training": {"rank": "8"}}, "rank is '8'; expected a whole number"),
        ({"training": {"boundary": 10**400}}, "boundary is 1000.*, which is too large"),
        ({"training": {"side": "semantic"}}, "`side` in `training` is 'semantic', but this run trains a detail expert"),
        (
            {"dataset": {"folder": "clips"}, "vae": "base.safetensors"},
            "`vae` is .*base.safetensors, which is not a VAE",
        ),
        ({"dataset": {"folder": "clips"}, "vae": None}, "`vae` is None; expected a path"),
    ],
)
def test_settings_that_do_not_fit_are_named(more, error, base_file, module):
    settings = {"model": "base.safetensors", "dataset": "data.safetensors", "output": "expert.safetensors", **more}
    with pytest.raises(module("dcm_core.errors").DCMError, match=error):
        module("nodes.host.training.command").train("detail", settings, base_file.parent)


def test_a_semantic_expert_under_a_semantic_one_is_refused(base_file, module):
    settings = {"model": "base.safetensors", "dataset": "data.safetensors", "output": "e.safetensors", "semantic": "s"}
    with pytest.raises(ValueError, match=r"`semantic` names the expert under a detail expert.* Remove `semantic`"):
        module("nodes.host.training.command").train("semantic", settings, base_file.parent)


def test_settings_of_the_other_expert_are_told(base_file, module, caplog):
    """They may be there for both experts."""
    training = {"adversarial_weight": 0.2, "steps": 3, "accumulate": 2, "shared": False}
    settings = {"model": base_file.name, "output": "e", "training": training}

    def read(side):
        (part,) = module("nodes.host.training.parts").parts_of(side, settings, base_file.parent)
        return part.config

    assert read("semantic").steps == 3
    assert caplog.messages == ["`adversarial_weight` has no effect: only a detail expert has this setting."]
    caplog.clear()
    read("detail")
    assert caplog.messages == ["`shared` has no effect: only a semantic expert has this setting."]


def without(tensors, part):
    return {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("missing", lambda tensors: without(tensors, "ffn")),
        ("short", lambda tensors: {**tensors, "blocks.0.ffn.0.weight": torch.zeros(5, 256)}),
        ("flat", lambda tensors: {**tensors, "patch_embedding.weight": torch.zeros(5)}),
    ],
)
def test_a_broken_model_file_is_named(name, change, base_file, module):
    save_file(change(load_file(base_file)), base_file.with_name(f"{name}.safetensors"))
    settings = {"model": f"{name}.safetensors", "dataset": "data.safetensors", "output": "e.safetensors"}
    with pytest.raises(
        module("dcm_core.errors").CheckpointError,
        match=rf"{name}\.safetensors has missing tensors, or tensors of a wrong shape: ComfyUI .* cannot load it",
    ):
        module("nodes.host.training.command").train("semantic", settings, base_file.parent)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, "`text_encoders` is None; expected a list of the model's text encoder files"),
        ([], r"`text_encoders` is \[\]; expected a list"),
        ("encoder.safetensors", "`text_encoders` is 'encoder.safetensors'; expected a list"),
        ([3], "`text_encoders` is 3; expected a path"),
        (["encoder.safetensors"], "encoder.safetensors is a PyTorch pickle"),
    ],
)
def test_text_encoders_are_a_list_of_safetensors(given, error, module, tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(module("dcm_core.errors").DCMError, match=error):
        module("nodes.host.training.command").load_clip({"text_encoders": given}, tmp_path, model=None)


def test_an_input_in_the_home_folder_is_not_written_over(base_file, module, monkeypatch):
    monkeypatch.setenv("HOME", str(base_file.parent))
    monkeypatch.setenv("USERPROFILE", str(base_file.parent))
    settings = {"model": "~/base.safetensors", "dataset": "data.safetensors", "output": "base.safetensors"}
    with pytest.raises(
        module("dcm_core.errors").DCMError,
        match=r"model is ~/base\.safetensors, which is the file that this run writes",
    ):
        module("nodes.host.training.command").train("semantic", settings, base_file.parent)


def test_encoding_says_how_far_it_is(module, caplog):
    progress = module("nodes.host.training.command").logged_progress("dataset")
    with caplog.at_level("INFO"):
        for done in (0, 50, 120, 300, 310, 1000):
            progress(done, 1000)
    assert [record.message for record in caplog.records] == ["dataset 10%", "dataset 30%", "dataset 100%"]
